"""Everything a loop needs, in order: model, engine, data order, schedule, checkpoints, and where the run stands."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tunesmith.train.checkpoint import conversion, fingerprint
from tunesmith.train.checkpoint import find as checkpoint_find
from tunesmith.train.checkpoint.checkpoints import Checkpoints
from tunesmith.train.checkpoint.conversion import Conversion
from tunesmith.train.checkpoint.find import Found
from tunesmith.train.checkpoint.random_state import seed_rank
from tunesmith.train.config.config import AdapterKind, Config, Kernels, Packing
from tunesmith.train.data.order import GlobalOrder
from tunesmith.train.data.prepare import PreparedData
from tunesmith.train.engine import TAG, Engine
from tunesmith.train.files import run_folder
from tunesmith.train.files.manifest import Identity
from tunesmith.train.files.run_folder import best_folder
from tunesmith.train.model.adapter import transformer_blocks
from tunesmith.train.model.kernel_choice import choose_kernels
from tunesmith.train.model.load import load_model
from tunesmith.train.model.lora_layers import use_our_lora
from tunesmith.train.model.timed_picks import use_timed_picks
from tunesmith.train.ranks.distributed import World, barrier, use_timeout
from tunesmith.train.ranks.progress import reach
from tunesmith.train.ranks.state import RunState
from tunesmith.train.run.guards import rollback
from tunesmith.train.run.packing_check import check_packing
from tunesmith.train.run.schedule import learning_rate_factor
from tunesmith.train.track.metrics import Throughput, flops_per_token, peak_flops
from tunesmith.train.track.reporter import Reporter
from tunesmith.train.watch.stale_locks import clear_stale_locks, extensions_folder
from tunesmith.train.watch.timeouts import Timeouts
from tunesmith.train.zero.sharding import full_shape


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
    ours = fingerprint.identity(config, world, data)
    fingerprint.check_allowed(config.resume.allow, ours)
    reporter.phase("looking for a checkpoint")
    reach("looking for a checkpoint")
    found = checkpoint_find.choose(config.resume, run_dir, world, device, reporter.warn)
    converted = _begin_to_take_up(found, ours, config, run_dir, world, reporter) if found else None
    reporter.phase(f"loading {config.model.name_or_path}")
    reach("loading the model")
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
    reach("making the engine")
    if world.local_rank == 0:
        clear_stale_locks(extensions_folder(), reporter.warn)
    barrier()
    engine = Engine(model, config, world, device, reporter.warn)
    use_timeout(Timeouts.of(config.cluster).of_process_group / 60)  # the groups DeepSpeed made have torch's own
    check_packing(engine, config, evaluates=data.validation is not None)
    order = make_order(config, data)
    total_steps = config.schedule.max_steps or order.steps_for(config.schedule.epochs or 0)
    if config.adapter.kind is not AdapterKind.none:
        ours = fingerprint.with_base_weights(ours, engine.module, world, device)
        if found:
            fingerprint.compare(found.manifest.identity, ours, config.resume.allow, found.path)
    checkpoints = Checkpoints(run_dir, config.checkpoint, ours, world, device, reporter)
    seed_rank(config.seed, world.rank)
    reach("taking up the checkpoint" if found else "starting")
    folder = converted.wait(device, minutes=config.cluster.start_timeout_minutes) if converted else None
    state = checkpoints.load(engine, found, converted=folder, seed=config.seed) if found else RunState()
    rollback.take_up(state, run_dir, world, device)
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
        resumed_from=found.path if found else None,
    )


def _begin_to_take_up(
    found: Found, ours: Identity, config: Config, run_dir: Path, world: World, reporter: Reporter
) -> Conversion | None:
    """Refuses a checkpoint of another run before minutes go into loading a model; begins to convert one that is cut
    for other ranks.
    """
    saved = found.manifest.identity
    for note in fingerprint.compare(saved, ours, config.resume.allow, found.path):
        reporter.note(note)
    if saved.layout == ours.layout:
        return None
    changed = [
        f"{key} {saved.layout.get(key)} -> {now}" for key, now in ours.layout.items() if saved.layout.get(key) != now
    ]
    reporter.note(f"the checkpoint is converted for this run: {', '.join(changed)}")
    return conversion.start(found.path, found.path / TAG, run_dir, world)


def make_order(config: Config, data: PreparedData) -> GlobalOrder:
    """The stream of training sequences; by length where they are not packed."""
    return GlobalOrder(
        data.train.num_sequences,
        global_batch_size=config.batch.global_batch_size,
        seed=config.seed,
        lengths=data.train.lengths if config.batch.packing is Packing.none else None,
    )


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
    often = bool(config.checkpoint.every_steps or config.checkpoint.every_minutes)
    saves = often or config.checkpoint.at_end
    kept = (config.checkpoint.keep_last + 2) if often else 1  # one being written, and the best
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
