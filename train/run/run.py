"""A run from its config to its model: prepare the data, meet the other ranks, train, finish."""

import contextlib
import json
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
import yaml
from filelock import FileLock

from tunesmith.train.checkpoint import find as checkpoint_find
from tunesmith.train.config.compose import Composed
from tunesmith.train.config.config import Config
from tunesmith.train.data.prepare import PreparedData, prepare
from tunesmith.train.data.preview import preview
from tunesmith.train.data.tokenizer import load_tokenizer
from tunesmith.train.errors import EXIT_STOPPED, Stopped, TrainingError, TunesmithError
from tunesmith.train.files import run_folder
from tunesmith.train.files.fence import Token, fence, token_from_environment
from tunesmith.train.model.kernel_choice import choose_kernels
from tunesmith.train.model.load import check_model
from tunesmith.train.ranks import distributed
from tunesmith.train.ranks.distributed import World
from tunesmith.train.ranks.progress import plan_faults, progress, reach
from tunesmith.train.redact import redact
from tunesmith.train.track.console import Console
from tunesmith.train.track.reporter import Reporter
from tunesmith.train.watch import node_checks
from tunesmith.train.watch.failure import failed_summary
from tunesmith.train.watch.out_of_memory import explained
from tunesmith.train.watch.timeouts import Timeouts
from tunesmith.train.watch.watchdog import Watchdog
from tunesmith.train.zero import deepspeed_config as engine_config

if TYPE_CHECKING:
    from collections.abc import Callable

    from tunesmith.train.run.guards.rollback import RollBack
    from tunesmith.train.run.loop import Loop
    from tunesmith.train.run.setup import Run


def run(composed: Composed) -> Path:
    """Trains and returns the run folder. Every rank calls it; raises TunesmithError for what the user can mend."""
    plan_faults()
    reach("starting", 0)
    config = composed.config
    world = distributed.world_from_environment()
    node_checks.check_launch(config, world)
    engine_config.check(config, world.world_size)
    _make_absolute(composed)
    device = distributed.choose_device(config.cluster.device, world)
    choose_kernels(config, device)
    run_dir = run_folder.choose(config)
    run_folder.check_usable(run_dir, config.resume.source)
    if run_folder.is_finished(run_dir) and config.resume.source == "auto":
        if world.rank == 0:
            Console().print(f"{run_dir} is already finished; another output_dir starts another run.")
        return run_dir
    checkpoint_find.check_source(config.resume, run_dir)
    reporter = Reporter(Console() if world.rank == 0 else None)
    if progress.plan is not None:
        reporter.warn("TUNESMITH_FAULTS is set: this run will be hurt on purpose")
    timeouts, watchdog = Timeouts.of(config.cluster), None
    try:
        check_model(config)
        tokenizer = load_tokenizer(config.model, config.data)
        reach("preparing the data")
        data = prepare(config, tokenizer, show_progress=world.local_rank == 0)
        if config.data.preview:
            reporter.note(preview(tokenizer, data.train, config.data.preview))
        reach("meeting the other ranks")
        store = distributed.start(
            world, device, timeouts.of_process_group / 60, start_minutes=config.cluster.start_timeout_minutes
        )
        watchdog = Watchdog(world, timeouts, store, lambda line: _close(reporter, config, line))
        run_dir = Path(distributed.broadcast_text(str(run_dir), device))
        nodes = node_checks.check_nodes(config, composed.resolved, world, device, store, run_dir)
        _train(composed, world, device, run_dir, tokenizer, data, reporter, watchdog, nodes)
        watchdog.leave()
    except Exception as error:
        if watchdog is None:
            raise
        _fail(composed, watchdog, error)
    except BaseException:  # asked to end, which is no failure
        if watchdog is not None:
            watchdog.leave()
        raise
    finally:
        fence.leave()
        reporter.close()
        distributed.stop()
    return run_dir


def _fail(composed: Composed, watchdog: Watchdog, error: Exception) -> NoReturn:
    """All ranks end, and one of them says why."""
    known = explained(error, composed.config, watchdog.world) or error
    if isinstance(known, TunesmithError):
        with contextlib.suppress(TunesmithError), composed.errors_located():
            raise known
    watchdog.fail(known)


def _close(reporter: Reporter, config: Config, line: str) -> None:
    reporter.finish(failed_summary(config.name, progress.step, line), exit_code=1)
    reporter.close()


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
    watchdog: Watchdog,
    nodes: list[tuple[str, str]],
) -> None:
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    # Imported here because DeepSpeed picks its accelerator while it is imported.
    from tunesmith.train.run.finish import finish
    from tunesmith.train.run.setup import set_up
    from tunesmith.train.run.summary import start_rows

    # First, where the folder is there: setting up renames and removes in it. A new one is made once all else is well.
    token = _common_token(device)
    held = _of_folder(lambda: _take(run_dir, token) if run_dir.is_dir() else None, world, device, run_dir)
    ready = set_up(composed.config, world, device, run_dir, tokenizer, data, reporter)
    reporter.table([*start_rows(ready), *nodes], composed.config.name)
    lock = _of_folder(lambda: _create_folder(composed, run_dir, held, token), world, device, run_dir)
    fence.join(run_dir, token)
    if world.local_rank == 0:
        fence.watch(watchdog.superseded)
    watchdog.use_folder(run_dir, composed.config.name)
    reporter.begin(composed.config, composed.resolved, run_dir, ready.throughput, ready.total_steps, ready.state.step)
    # Whatever this run was resumed from: what it rolls back to is in its own folder.
    again = replace(composed.config, resume=replace(composed.config.resume, source="auto"))
    try:
        finish(train_to_end(ready, lambda: set_up(again, world, device, run_dir, tokenizer, data, reporter)))
        if lock:
            lock.release()
    except Stopped as stopped:
        _tell_stopped(ready, stopped)
        raise


def train_to_end(run: "Run", set_up_again: "Callable[[], Run]") -> "Loop":
    """Trains, going back to a checkpoint as often as the loss spikes and the config says so; the loop at its end.

    The run stays the same object: what is set up again takes the place of what was in it.
    """
    from tunesmith.train.run.guards.rollback import take_down
    from tunesmith.train.run.loop import Loop

    loop = Loop(run)
    while back := _until_rollback(loop):
        del loop  # it holds the weights, and the next engine needs the memory
        take_down(run, back)
        vars(run).update(vars(set_up_again()))
        run.reporter.go_back(run.state.step, run.throughput)
        loop = Loop(run)
    return loop


def _until_rollback(loop: "Loop") -> "RollBack | None":
    """Trains to the end, or until the loss spikes."""
    from tunesmith.train.run.guards.rollback import RollBack

    try:
        loop.train()
    except RollBack as back:
        return back.with_traceback(None)  # the traceback's frames hold the engine
    return None


def _tell_stopped(ready: "Run", stopped: Stopped) -> None:
    """Rank 0 writes down that the run was stopped; no rank leaves before: its launcher would end rank 0 too."""
    newest = ready.checkpoints.newest() if stopped.step else None
    saved = f"saved in {newest}" if newest else "nothing was saved"
    if newest and ready.checkpoints.saved_step != ready.state.step:  # a full disk, or checkpoint.at_end=false
        saved = f"that step could not be saved, the newest checkpoint is {newest}"
    ready.reporter.note(
        f"stopped at step {ready.state.step} ({stopped.reason}); {saved}. To go on: the same command, with "
        f"output_dir={ready.run_dir}"
    )
    summary = {
        "status": "stopped",
        "name": ready.config.name,
        "steps": ready.state.step,
        "reason": stopped.reason,
        "checkpoint": str(newest) if newest else None,
    }
    ready.reporter.finish(summary, exit_code=EXIT_STOPPED)
    if stopped.step is not None:  # None: only this rank was asked, before the others listened
        distributed.barrier()


def _common_token(device: torch.device) -> Token:
    """Rank 0's, on every rank."""
    return Token(**json.loads(distributed.broadcast_text(json.dumps(asdict(token_from_environment())), device)))


def _take(run_dir: Path, token: Token) -> FileLock:
    """The folder is this attempt's, before it looks for a checkpoint in it; rank 0 only."""
    lock = run_folder.hold(run_dir, token)
    fence.take(run_dir, token)
    checkpoint_find.remove_stale(run_dir)
    return lock


def _create_folder(composed: Composed, run_dir: Path, held: FileLock | None, token: Token) -> FileLock:
    lock = run_folder.create(run_dir, yaml.safe_dump(redact(composed.resolved), sort_keys=False), held)
    fence.take(run_dir, token)
    return lock


def _of_folder(
    take: "Callable[[], FileLock | None]", world: World, device: torch.device, run_dir: Path
) -> FileLock | None:
    """The lock that rank 0 takes on the run folder, None on the others; every rank hears when it cannot."""
    lock, problem = None, None
    try:
        if world.rank == 0:
            lock = take()
    except (TunesmithError, OSError) as error:
        problem = error
    if not distributed.all_ranks(problem is None, device):
        raise problem or TrainingError("rank 0 could not take the run folder.", at=str(run_dir))
    return lock
