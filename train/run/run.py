"""A run from its config on: check, prepare the data, meet the other ranks, train; and what is said when it fails."""

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch

from tunesmith.train.checkpoint import find as checkpoint_find
from tunesmith.train.checkpoint import fingerprint
from tunesmith.train.config.compose import Composed, load_resolved
from tunesmith.train.config.config import Config
from tunesmith.train.data.prepare import PreparedData, check_same_data, prepare
from tunesmith.train.data.prepare import fingerprint as data_fingerprint
from tunesmith.train.data.preview import preview
from tunesmith.train.data.tokenizer import load_tokenizer
from tunesmith.train.errors import DataError, TunesmithError
from tunesmith.train.files import run_folder
from tunesmith.train.files.fence import fence
from tunesmith.train.files.manifest import Identity
from tunesmith.train.model.kernel_choice import choose_kernels
from tunesmith.train.model.load import check_model
from tunesmith.train.model.packing import settle
from tunesmith.train.model.vocabulary import check_rows
from tunesmith.train.objective.objective import Objective, make_objective
from tunesmith.train.paths import user_path
from tunesmith.train.ranks import distributed
from tunesmith.train.ranks.distributed import World
from tunesmith.train.ranks.phases import Phase
from tunesmith.train.ranks.progress import plan_faults, progress, reach
from tunesmith.train.run.memory_plan import settle_memory
from tunesmith.train.run.versions_check import check_versions
from tunesmith.train.track.console import Console
from tunesmith.train.track.reporter import Reporter
from tunesmith.train.watch import node_checks
from tunesmith.train.watch.failure import failed_summary
from tunesmith.train.watch.out_of_memory import explained
from tunesmith.train.watch.timeouts import Timeouts
from tunesmith.train.watch.watchdog import Watchdog
from tunesmith.train.zero import deepspeed_config


def run(composed: Composed) -> Path:
    """Trains and returns the run folder. Every rank calls it; raises TunesmithError for what the user can mend."""
    plan_faults()
    reach(Phase.starting, 0)
    config = composed.config
    world = distributed.world_from_environment()
    node_checks.check_launch(config, world)
    deepspeed_config.check(config, world.world_size)
    _make_absolute(composed)
    device = distributed.choose_device(config.cluster.device, world)
    kernels = choose_kernels(config, device)
    run_dir = run_folder.choose(config)
    run_folder.check_usable(run_dir, config.resume.source)
    summary = run_folder.finished_summary(run_dir) if config.resume.source == "auto" else None
    if summary is not None:
        _say_finished(composed, world, device, run_dir, summary)
        return run_dir
    checkpoint_find.check_source(config.resume, run_dir)
    reporter = Reporter(Console() if world.rank == 0 else None)
    if progress.plan is not None:
        reporter.warn("TUNESMITH_FAULTS is set: this run will be hurt on purpose")
    timeouts, watchdog = Timeouts.of(config.cluster), None
    try:
        tokenizer, objective, data = _prepare(composed, world, device, reporter)
        reach(Phase.meeting_ranks)
        store = distributed.start(
            world, device, timeouts.of_process_group / 60, start_minutes=config.cluster.start_timeout_minutes
        )
        watchdog = Watchdog(world, timeouts, store, lambda line: _close(reporter, config, line))
        run_dir = Path(distributed.broadcast_text(str(run_dir), device))
        check_same_data(data.fingerprint, device)
        nodes = node_checks.check_nodes(config, composed.resolved, world, device, store, run_dir)
        check_versions(config, world, device, reporter)
        os.environ.setdefault("DS_ACCELERATOR", device.type)
        settle_memory(config, check_model(config), world, device, reporter.note)
        # Imported here because DeepSpeed picks its accelerator while it is imported.
        from tunesmith.train.run.setup import make_run
        from tunesmith.train.run.training import train

        made = make_run(
            config,
            world,
            device,
            run_dir,
            tokenizer=tokenizer,
            objective=objective,
            data=data,
            kernels=kernels,
            reporter=reporter,
        )
        train(composed, made, watchdog, nodes)
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


def _say_finished(
    composed: Composed, world: World, device: torch.device, run_dir: Path, summary: dict[str, Any]
) -> None:
    """Rank 0 says so. Raises TrainingError where the finished run is one of other settings, data or base model."""
    if world.rank > 0:
        return
    config, notes = composed.config, list[str]()
    if tree := summary.get("identity"):  # runs of before 2026-12 do not say what they were
        saved = Identity.from_tree(tree)
        data = _data_of_finished(composed, device, run_dir)
        if data is None:
            notes.append("the data of that run is not there any more, and was not compared")
        now = data or (saved.fingerprint["data"], saved.data)
        current = fingerprint.of_finished(config, world, *now)
        fingerprint.check_allowed(config.resume.allow, current)
        notes += fingerprint.compare_finished(saved, current, config.resume.allow, run_dir)
    for line in [*notes, f"{run_dir} is already finished; another output_dir starts another run."]:
        Console().print(line)


def _data_of_finished(composed: Composed, device: torch.device, run_dir: Path) -> tuple[str, dict[str, str]] | None:
    """The fingerprint and its parts of the data as it is now; None where the run's own data has gone, as staged data
    does.
    """
    config = composed.config
    _settle_packing(composed, device, lambda text: None)
    tokenizer = load_tokenizer(config.model, config.data)
    try:
        return data_fingerprint(config, tokenizer, make_objective(config, tokenizer))
    except DataError:
        if load_resolved(run_dir / run_folder.CONFIG).data != config.data:
            raise
        return None


def _prepare(
    composed: Composed, world: World, device: torch.device, reporter: Reporter
) -> tuple[Any, Objective, PreparedData]:
    """Tokenizer, objective and data: what is wrong with them is said before the ranks meet."""
    config = composed.config
    hf_config = _settle_packing(composed, device, reporter.note)
    tokenizer = load_tokenizer(config.model, config.data)
    objective = make_objective(config, tokenizer)
    reach(Phase.preparing_data)
    data = prepare(config, tokenizer, objective, show_progress=world.local_rank == 0)
    check_rows(config, hf_config, tokenizer, data, reporter.note)
    if config.data.preview:
        reporter.note(preview(tokenizer, data.train, config.data.preview))
    return tokenizer, objective, data


def _settle_packing(composed: Composed, device: torch.device, note: Callable[[str], None]) -> Any:
    """Writes batch.packing=auto down as what it comes to: the data is prepared for it, and a resumed run must have the
    same. Returns transformers' config of the model.
    """
    config = composed.config
    hf_config = check_model(config)
    settle(config, hf_config, device, note)
    composed.resolved["batch"]["packing"] = config.batch.packing.value
    return hf_config


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
    folder = user_path(composed.config.model.name_or_path)
    if folder.is_dir():
        composed.config.model.name_or_path = composed.resolved["model"]["name_or_path"] = str(folder.absolute())
