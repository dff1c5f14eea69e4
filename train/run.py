"""A run from its config to its model: prepare the data, meet the other ranks, train, finish."""

import os
from pathlib import Path
from typing import Any

import torch
import yaml
from filelock import FileLock

from tunesmith.train import checkpoint, distributed, engine_config, run_folder
from tunesmith.train.compose import Composed
from tunesmith.train.config import Config
from tunesmith.train.console import Console
from tunesmith.train.data.prepare import PreparedData, prepare
from tunesmith.train.data.preview import preview
from tunesmith.train.distributed import World
from tunesmith.train.errors import TrainingError, TunesmithError
from tunesmith.train.kernel_choice import choose_kernels
from tunesmith.train.model import check_model
from tunesmith.train.redact import redact
from tunesmith.train.reporter import Reporter
from tunesmith.train.tokenizer import load_tokenizer


def run(composed: Composed) -> Path:
    """Trains and returns the run folder. Every rank calls it; raises TunesmithError for what the user can mend."""
    config = composed.config
    world = distributed.world_from_environment()
    engine_config.check(config, world.world_size)
    _make_absolute(composed)
    device = distributed.choose_device(config.cluster.device, world)
    choose_kernels(config, device)
    run_dir = run_folder.choose(config)
    run_folder.check_usable(run_dir, config.resume)
    if run_folder.is_finished(run_dir) and config.resume == "auto":
        if world.rank == 0:
            Console().print(f"{run_dir} is already finished; another output_dir starts another run.")
        return run_dir
    checkpoint.find(config.resume, run_dir)
    reporter = Reporter(Console() if world.rank == 0 else None)
    try:
        check_model(config)
        tokenizer = load_tokenizer(config.model, config.data)
        data = prepare(config, tokenizer, show_progress=world.local_rank == 0)
        if config.data.preview:
            reporter.note(preview(tokenizer, data.train, config.data.preview))
        distributed.start(world, device, config.cluster.timeout_minutes)
        run_dir = Path(distributed.broadcast_text(str(run_dir), device))
        _train(composed, world, device, run_dir, tokenizer, data, reporter)
    finally:
        reporter.close()
        distributed.stop()
    return run_dir


def _make_absolute(composed: Composed) -> None:
    """A model folder is written down so that chat and export find it from anywhere."""
    folder = Path(composed.config.model.name_or_path).expanduser()
    if folder.is_dir():
        composed.config.model.name_or_path = composed.resolved["model"]["name_or_path"] = str(folder.absolute())


def _train(
    composed: Composed,
    world: World,
    device: torch.device,
    run_dir: Path,
    tokenizer: Any,
    data: PreparedData,
    reporter: Reporter,
) -> None:
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    # Imported here because DeepSpeed picks its accelerator while it is imported.
    from tunesmith.train.finish import finish
    from tunesmith.train.loop import Loop
    from tunesmith.train.setup import set_up
    from tunesmith.train.summary import start_rows

    ready = set_up(composed.config, world, device, run_dir, tokenizer, data, reporter)
    reporter.table(start_rows(ready), composed.config.name)
    lock = _create_folder(composed, world, device, run_dir)
    reporter.begin(composed.config, composed.resolved, run_dir, ready.throughput, ready.total_steps, ready.state.step)
    loop = Loop(ready)
    try:
        loop.train()
        finish(loop)
        if lock:
            lock.release()
    except BaseException as error:
        reporter.finish(_failure(composed.config, ready.state.step, error), exit_code=1)
        raise


def _create_folder(composed: Composed, world: World, device: torch.device, run_dir: Path) -> FileLock | None:
    """Rank 0 makes the run folder and holds its lock; every rank hears when it cannot."""
    lock, problem = None, None
    try:
        if world.rank == 0:
            lock = run_folder.create(run_dir, yaml.safe_dump(redact(composed.resolved), sort_keys=False))
    except (TunesmithError, OSError) as error:
        problem = error
    if not distributed.all_ranks(problem is None, device):
        raise problem or TrainingError("rank 0 could not make the run folder.", at=str(run_dir))
    return lock


def _failure(config: Config, step: int, error: BaseException) -> dict[str, Any]:
    reason = str(error).splitlines()
    return {
        "status": "failed",
        "name": config.name,
        "steps": step,
        "error": reason[0] if reason else type(error).__name__,
    }
