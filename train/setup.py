"""Everything a loop needs, in order: model, engine, data order, schedule, checkpoints, and where the run stands."""

import math
import random
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from tunesmith.train import checkpoint, run_folder
from tunesmith.train.adapter import transformer_blocks
from tunesmith.train.checkpoint import Checkpoints
from tunesmith.train.config import AdapterKind, Config, Kernels, Packing
from tunesmith.train.data.order import GlobalOrder
from tunesmith.train.data.prepare import PreparedData
from tunesmith.train.distributed import World, broadcast_text
from tunesmith.train.engine import Engine
from tunesmith.train.engine_sharding import full_shape
from tunesmith.train.isolation import check_packing
from tunesmith.train.kernel_choice import choose_kernels
from tunesmith.train.lora_layers import use_our_lora
from tunesmith.train.metrics import Throughput, flops_per_token, peak_flops
from tunesmith.train.model import load_model
from tunesmith.train.reporter import Reporter
from tunesmith.train.run_folder import best_folder
from tunesmith.train.schedule import learning_rate_factor
from tunesmith.train.state import RunState
from tunesmith.train.timed_picks import use_timed_picks


@dataclass(frozen=True)
class ModelSize:
    """Parameters of the model, adapter included; matmul: those a token is multiplied with (arXiv:2204.02311)."""

    parameters: int
    trainable: int
    matmul: int
    trainable_matmul: int


@dataclass
class Run:
    """A run ready to train."""

    config: Config
    world: World
    run_dir: Path
    engine: Engine
    tokenizer: Any
    data: PreparedData
    order: GlobalOrder
    total_steps: int
    learning_rate_factor: Callable[[int], float]
    checkpoints: Checkpoints
    state: RunState
    size: ModelSize
    throughput: Throughput
    reporter: Reporter
    resumed_from: Path | None


def set_up(
    config: Config,
    world: World,
    device: torch.device,
    run_dir: Path,
    tokenizer: Any,
    data: PreparedData,
    reporter: Reporter,
) -> Run:
    """Every rank calls it, after the ranks have met. Raises TunesmithError, with no run folder left behind."""
    ours = fingerprint(config, world, data)
    found = broadcast_text(str(checkpoint.find(config.resume, run_dir) or "") if world.rank == 0 else None, device)
    if found:
        checkpoint.check(Path(found), ours)  # before minutes go into loading a model that cannot take it up
    reporter.phase(f"loading {config.model.name_or_path}")
    model = load_model(config, world)
    size = model_size(model)
    _check_disk(config, size, run_dir, world, device)
    throughput = _throughput(model, size, config, data, world, device)
    kernels = choose_kernels(config, device)
    for left_to_peft in use_our_lora(model, kernels, sharded=config.engine.stage == 3):
        reporter.warn(left_to_peft)
    if kernels is Kernels.triton and device.type == "cuda":
        reporter.phase("timing kernels on this GPU, or reading what was timed before")
        use_timed_picks(model, config, world, device, reporter.warn)
    engine = Engine(model, config, world, device, reporter.warn)
    check_packing(engine, config, evaluates=data.validation is not None)
    order = make_order(config, data)
    total_steps = config.schedule.max_steps or order.steps_for(config.schedule.epochs or 0)
    checkpoints = Checkpoints(run_dir, keep_last=config.checkpoint.keep_last, fingerprint=ours, world=world)
    seed_everything(config.seed * 65_537 + world.rank)
    state = checkpoints.load(engine, Path(found)) if found else RunState()
    if state.best_step is not None and not best_folder(run_dir, state.best_step).is_dir():
        state.best_step = state.best_eval_loss = None  # taken over from another run, whose best weights are not here
    return Run(
        config=config,
        world=world,
        run_dir=run_dir,
        engine=engine,
        tokenizer=tokenizer,
        data=data,
        order=order,
        total_steps=total_steps,
        learning_rate_factor=learning_rate_factor(config.schedule, total_steps),
        checkpoints=checkpoints,
        state=state,
        size=size,
        throughput=throughput,
        reporter=reporter,
        resumed_from=Path(found) if found else None,
    )


def make_order(config: Config, data: PreparedData) -> GlobalOrder:
    """The stream of training sequences; by length where they are not packed."""
    return GlobalOrder(
        data.train.num_sequences,
        global_batch_size=config.batch.global_batch_size,
        seed=config.seed,
        lengths=data.train.lengths if config.batch.packing is Packing.none else None,
    )


def seed_everything(seed: int) -> None:
    """Seeds Python, NumPy and torch on this rank."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def fingerprint(config: Config, world: World, data: PreparedData) -> dict[str, object]:
    """What must be the same for a checkpoint to go on as the same run."""
    return {
        "model": config.model.name_or_path,
        "adapter": str(config.adapter.kind),
        **{f"adapter.{name}": value for name, value in asdict(config.adapter).items() if name != "kind"},
        "data": data.fingerprint,
        "seed": config.seed,
        "batch.global_batch_size": config.batch.global_batch_size,
        "engine.stage": config.engine.stage,
        "engine.precision": str(config.engine.precision),
        "world_size": world.world_size,
    }


def model_size(model: nn.Module) -> ModelSize:
    """Counts whole parameters, also where ZeRO 3 has split them; a tied embedding counts once, as the head."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    head_parameters = {id(p) for p in head.parameters()} if head is not None else set()
    looked_up = {
        id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()
    } - head_parameters
    total = trainable = matmul = trainable_matmul = 0
    for parameter in model.parameters():
        shape = full_shape(parameter)
        count = math.prod(shape)
        multiplied = count if len(shape) >= 2 and id(parameter) not in looked_up else 0
        total += count
        matmul += multiplied
        if parameter.requires_grad:
            trainable += count
            trainable_matmul += multiplied
    return ModelSize(total, trainable, matmul, trainable_matmul)


def checkpoint_bytes(size: ModelSize, config: Config) -> int:
    """About one checkpoint: compute weights, and fp32 master weights and two moments of what is trained."""
    whole = size.trainable if config.adapter.kind is not AdapterKind.none else size.parameters
    return 4 * whole + 12 * size.trainable


def _check_disk(config: Config, size: ModelSize, run_dir: Path, world: World, device: torch.device) -> None:
    """All ranks learn of a full disk from rank 0, before anything is written."""
    saves = bool(config.checkpoint.every_steps) or config.checkpoint.at_end
    kept = (config.checkpoint.keep_last + 2) if config.checkpoint.every_steps else 1  # one being written, and the best
    needed = run_folder.SPARE_BYTES + checkpoint_bytes(size, config) * (kept if saves else 0) + 8 * size.parameters
    run_folder.check_writable(run_dir, needed)


def _throughput(
    model: nn.Module, size: ModelSize, config: Config, data: PreparedData, world: World, device: torch.device
) -> Throughput:
    hf = model.config
    heads = getattr(hf, "num_attention_heads", 1)
    head_dim = getattr(hf, "head_dim", None) or getattr(hf, "hidden_size", 0) // heads
    flops = flops_per_token(
        num_matmul_parameters=size.matmul,
        num_trainable_matmul_parameters=size.trainable_matmul,
        num_layers=len(transformer_blocks(model)),
        hidden_size=heads * head_dim,
        mean_context=data.train.num_tokens / max(1, data.train.num_records) / 2,
    )
    peak = peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return Throughput(world_size=world.world_size, flops_per_token=flops, peak_flops_per_gpu=peak)
