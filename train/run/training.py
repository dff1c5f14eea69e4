"""A run that is ready: take its folder, train, go back after a loss spike, finish, or say that it was stopped."""

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import torch
import yaml
from filelock import FileLock

from tunesmith.train.checkpoint import find as checkpoint_find
from tunesmith.train.config.compose import Composed
from tunesmith.train.config.override_text import typed
from tunesmith.train.errors import EXIT_STOPPED, Stopped, TrainingError, TunesmithError
from tunesmith.train.files import run_folder
from tunesmith.train.files.fence import Token, fence, token_from_environment
from tunesmith.train.ranks import distributed
from tunesmith.train.ranks.phases import Phase
from tunesmith.train.ranks.progress import reach
from tunesmith.train.redact import redact
from tunesmith.train.run.finish import finish
from tunesmith.train.run.guards.rollback import RollBack, write_down
from tunesmith.train.run.loop import Loop
from tunesmith.train.run.setup import Run, Session, open_session
from tunesmith.train.run.summary import start_rows
from tunesmith.train.watch.watchdog import Watchdog


def train(
    composed: Composed, run: Run, watchdog: Watchdog, nodes: list[tuple[str, str]], *, only_profile: bool
) -> None:
    """From the first session to the finished model. The run folder is made, or taken, only once all is ready.

    Args:
        nodes: rows of the table at the start.
        only_profile: to the page of the profile instead.
    """
    # First, where the folder is there: setting up renames and removes in it. A new one is made once all else is well.
    token = _common_token(run.device)
    held = _of_folder(lambda: _take(run.run_dir, token) if run.run_dir.is_dir() else None, run)
    session = open_session(run)
    run.reporter.table([*start_rows(run, session), *nodes], run.config.name)
    lock = _of_folder(lambda: _create_folder(composed, run.run_dir, held, token), run)
    fence.join(run.run_dir, token)
    if run.world.local_rank == 0:
        fence.watch(watchdog.superseded)
    watchdog.use_folder(run.run_dir, run.config.name)
    run.reporter.begin(
        run.config, composed.resolved, run.run_dir, session.throughput, run.feed.total_steps, session.state.step
    )
    loop = Loop(run, session)
    del session  # the loop's, which a roll-back replaces
    try:
        if only_profile:
            loop.profile()
            run.reporter.finish({"status": "profiled", "name": run.config.name, "steps": loop.session.state.step})
        else:
            while back := until_rollback(loop):
                loop = go_back(loop, back)
            finish(run, loop.session, loop.stop)
        if lock:
            lock.release()
    except Stopped as stopped:
        _tell_stopped(run, loop.session, stopped)
        raise


def until_rollback(loop: Loop) -> RollBack | None:
    """Trains to the end, or until the loss spikes."""
    try:
        loop.train()
    except RollBack as back:
        return back.with_traceback(None)  # the traceback's frames hold the engine
    return None


def go_back(loop: Loop, back: RollBack) -> Loop:
    """The loop from an earlier checkpoint on: the engine is made anew, as ZeRO 3 cannot load into a used one."""
    run = loop.run
    reach(Phase.rolling_back)
    loop.session.checkpoints.forget_after(back.to_step)  # or the next start would take the newest: it would spike again
    write_down(back, run.run_dir, run.world, run.device)
    loop.close()
    # Whatever this run was resumed from: what it rolls back to is in its own folder.
    again = replace(run, config=replace(run.config, resume=replace(run.config.resume, source="auto")))
    session = open_session(again)
    run.reporter.go_back(session.state.step, session.throughput)
    return Loop(run, session)


def _tell_stopped(run: Run, session: Session, stopped: Stopped) -> None:
    """Rank 0 writes down that the run was stopped; no rank leaves before: its launcher would end rank 0 too."""
    step, checkpoints = session.state.step, session.checkpoints
    newest = checkpoints.newest() if stopped.step else None
    saved = f"saved in {newest}" if newest else "nothing was saved"
    if newest and checkpoints.saved_step != step:  # a full disk, or checkpoint.at_end=false
        saved = f"that step could not be saved, the newest checkpoint is {newest}"
    run.reporter.note(
        f"stopped at step {step} ({stopped.reason}); {saved}. To go on: the same command, with "
        f"{typed('output_dir', run.run_dir)}"
    )
    summary = {
        "status": "stopped",
        "name": run.config.name,
        "steps": step,
        "reason": stopped.reason,
        "checkpoint": str(newest) if newest else None,
    }
    run.reporter.finish(summary, exit_code=EXIT_STOPPED)
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


def _of_folder(take: Callable[[], FileLock | None], run: Run) -> FileLock | None:
    """The lock that rank 0 takes on the run folder, None on the others; every rank hears when it cannot."""
    lock, problem = None, None
    try:
        if run.world.rank == 0:
            lock = take()
    except (TunesmithError, OSError) as error:
        problem = error
    if not distributed.all_ranks(problem is None, run.device):
        raise problem or TrainingError("rank 0 could not take the run folder.", at=str(run.run_dir))
    return lock
