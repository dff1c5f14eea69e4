"""Everything a loop needs: the run, which never changes, and the session, which a roll-back replaces."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tunesmith.train.answer.model_folder import try_settings
from tunesmith.train.checkpoint import conversion, fingerprint
from tunesmith.train.checkpoint import find as checkpoint_find
from tunesmith.train.checkpoint.checkpoints import Checkpoints
from tunesmith.train.checkpoint.conversion import Conversion
from tunesmith.train.checkpoint.find import FoundCheckpoint
from tunesmith.train.checkpoint.random_state import seed_rank
from tunesmith.train.config.config import AdapterKind, Config, Kernels
from tunesmith.train.data.prepare import PreparedData
from tunesmith.train.engine import TAG, Engine
from tunesmith.train.files import run_folder
from tunesmith.train.files.manifest import Identity
from tunesmith.train.files.run_folder import best_folder
from tunesmith.train.model.adapter import transformer_blocks
from tunesmith.train.model.block_kernels import use_block_kernels
from tunesmith.train.model.load import load_model
from tunesmith.train.model.lora_layers import use_lora_kernels
from tunesmith.train.model.size import ModelSize, model_size
from tunesmith.train.model.timed_picks import use_timed_picks
from tunesmith.train.model.vocabulary import num_ids
from tunesmith.train.objective.objective import Objective
from tunesmith.train.optimizer import STATE_BYTES
from tunesmith.train.profile.recorder import check_steps
from tunesmith.train.ranks.distributed import World, barrier, use_timeout
from tunesmith.train.ranks.phases import Phase
from tunesmith.train.ranks.progress import reach
from tunesmith.train.ranks.state import RunState
from tunesmith.train.run.feed import Feed, StoredFeed
from tunesmith.train.run.guards import rollback
from tunesmith.train.run.packing_check import check_packing
from tunesmith.train.run.schedule import learning_rate_factor
from tunesmith.train.track.metrics import Throughput, flops_per_token, peak_flops
from tunesmith.train.track.reporter import Reporter
from tunesmith.train.watch.stale_locks import clear_stale_locks, extensions_folder
from tunesmith.train.watch.timeouts import Timeouts


@dataclass(frozen=True)
class Run:
    """What a run is from its first step to its last."""

    config: Config
    world: World
    device: torch.device
    run_dir: Path
    kernels: Kernels
    tokenizer: Any
    objective: Objective
    data: PreparedData
    feed: Feed
    learning_rate_factor: Callable[[int], float]
    reporter: Reporter


@dataclass
class Session:
    """What a roll-back replaces: the live weights, and where the run stands."""

    engine: Engine
    checkpoints: Checkpoints
    state: RunState
    size: ModelSize
    throughput: Throughput
    resumed_from: Path | None


def make_run(
    config: Config,
    world: World,
    device: torch.device,
    run_dir: Path,
    *,
    tokenizer: Any,
    objective: Objective,
    data: PreparedData,
    kernels: Kernels,
    reporter: Reporter,
) -> Run:
    """Of prepared data; no rank needs another for it. kernels are those of choose_kernels()."""
    feed = StoredFeed(config, data.train, world, device, pad_token_id=tokenizer.pad_token_id)
    check_steps(config.profile, feed.total_steps)
    return Run(
        config=config,
        world=world,
        device=device,
        run_dir=run_dir,
        kernels=kernels,
        tokenizer=tokenizer,
        objective=objective,
        data=data,
        feed=feed,
        learning_rate_factor=learning_rate_factor(config.schedule, feed.total_steps),
        reporter=reporter,
    )


def open_session(run: Run) -> Session:
    """Model, engine, and the state of a checkpoint if there is one.

    Every rank calls it, after the ranks have met. Raises TunesmithError, with no run folder left behind.
    """
    config, world, device, reporter = run.config, run.world, run.device, run.reporter
    identity = fingerprint.identity(config, world, run.data.fingerprint, run.data.parts)
    fingerprint.check_allowed(config.resume.allow, identity)
    reporter.phase(Phase.finding_checkpoint)
    found = checkpoint_find.choose(config.resume, run.run_dir, world, device, reporter.warn)
    converted = _check_and_convert(found, identity, run) if found else None
    reporter.phase(Phase.loading_model, words=f"loading {config.model.name_or_path}")
    model = load_model(config, world, num_ids=num_ids(run.tokenizer))
    size = model_size(model)
    try_settings(model, run.tokenizer, config, world, device)
    _check_disk(config, size, run.run_dir, world, device)
    throughput = _throughput(model, size, run)
    engine = _make_engine(model, run)
    if config.adapter.kind is not AdapterKind.none:
        identity = fingerprint.with_base_weights(identity, engine.module, world, device)
        if found:
            fingerprint.compare(found.manifest.identity, identity, config.resume.allow, found.path)
    checkpoints = Checkpoints(run.run_dir, config.checkpoint, identity, world, device, reporter)
    seed_rank(config.seed, world.rank)
    reach(Phase.resuming if found else Phase.starting)
    folder = converted.wait(device, minutes=config.cluster.start_timeout_minutes) if converted else None
    state = checkpoints.load(engine, found, converted=folder, seed=config.seed) if found else RunState()
    rollback.add_decided(state, run.run_dir, world, device)
    if state.best_name != config.evaluate.metric:  # the best by another figure says nothing
        state.best_step, state.best_metric, state.evaluations_without_better = None, None, 0
        state.best_name = config.evaluate.metric
    if state.best_step is not None and not best_folder(run.run_dir, state.best_step).is_dir():
        state.best_step = state.best_metric = None  # of another run, whose best weights are not here
    return Session(engine, checkpoints, state, size, throughput, found.path if found else None)


def _make_engine(model: nn.Module, run: Run) -> Engine:
    config, world, device, reporter = run.config, run.world, run.device, run.reporter
    for left_to_peft in use_lora_kernels(model, run.kernels, sharded=config.engine.stage == 3):
        reporter.warn(left_to_peft)
    for left_to_transformers in use_block_kernels(model, run.kernels, device):
        reporter.note(left_to_transformers)
    if run.kernels is Kernels.triton and device.type == "cuda":
        reporter.phase(Phase.timing_kernels, words="timing kernels on this GPU, or reading what was timed before")
        use_timed_picks(model, config, world, device, reporter.warn)
    reach(Phase.making_engine)
    if world.local_rank == 0:
        clear_stale_locks(extensions_folder(), reporter.warn)
    barrier()
    engine = Engine(model, config, world, device, run.kernels, reporter.warn)
    use_timeout(Timeouts.of(config.cluster).of_process_group / 60)  # the groups DeepSpeed made have torch's own
    validation = run.data.validation
    if run.data.train.is_isolated or (validation is not None and validation.is_isolated):
        check_packing(engine, config, evaluates=validation is not None)
    return engine


def _check_and_convert(found: FoundCheckpoint, current: Identity, run: Run) -> Conversion | None:
    """Refuses a checkpoint of another run before minutes go into loading a model; begins to convert one that is cut
    for other ranks.
    """
    saved, reporter = found.manifest.identity, run.reporter
    for note in fingerprint.compare(saved, current, run.config.resume.allow, found.path):
        reporter.note(note)
    if saved.layout == current.layout:
        return None
    changed = [
        f"{key} {saved.layout.get(key)} -> {now}" for key, now in current.layout.items() if saved.layout.get(key) != now
    ]
    reporter.note(f"the checkpoint is converted for this run: {', '.join(changed)}")
    return conversion.start(found.path, found.path / TAG, run.run_dir, run.world)


def checkpoint_bytes(size: ModelSize, config: Config) -> int:
    """About one checkpoint: compute weights, and what the optimizer keeps of those that are trained."""
    whole = size.trainable if config.adapter.kind is not AdapterKind.none else size.parameters
    return 4 * whole + STATE_BYTES * size.trainable


def _check_disk(config: Config, size: ModelSize, run_dir: Path, world: World, device: torch.device) -> None:
    """All ranks learn of a full disk from rank 0, before anything is written."""
    often = bool(config.checkpoint.every_steps or config.checkpoint.every_minutes)
    saves = often or config.checkpoint.at_end
    kept = (config.checkpoint.keep_last + 2) if often else 1  # one being written, and the best
    needed = run_folder.SPARE_BYTES + checkpoint_bytes(size, config) * (kept if saves else 0) + 8 * size.parameters
    run_folder.check_writable(run_dir, needed)


def _throughput(model: nn.Module, size: ModelSize, run: Run) -> Throughput:
    hf, data, device = model.config, run.data, run.device
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
    return Throughput(world_size=run.world.world_size, flops_per_token=flops, peak_flops_per_gpu=peak)
