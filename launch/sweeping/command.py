"""The command line of launch/sweep.py: checked, handed to Hydra as a multirun, and its end said in words."""

import sys
from pathlib import Path
from typing import Any

from hydra._internal.callbacks import Callbacks
from hydra.errors import HydraException
from hydra.types import HydraContext
from omegaconf.errors import OmegaConfBaseException

from tunesmith.launch.arguments import take_option
from tunesmith.launch.config_docs import field_comments
from tunesmith.launch.sweeping import hydra_part
from tunesmith.launch.sweeping.hydra_launcher import train_trial
from tunesmith.launch.sweeping.hydra_part import Locator, located
from tunesmith.launch.sweeping.plan import make_plan
from tunesmith.launch.sweeping.settings import GROUP, SETTINGS, SweeperConfig
from tunesmith.launch.sweeping.sweeper import TunesmithSweeper
from tunesmith.launch.typed_secrets import refuse_secrets
from tunesmith.train.config.compose import SEARCH_SPACES, admit_raw_key, group_options
from tunesmith.train.errors import EXIT_STOPPED, ConfigError
from tunesmith.train.ranks.stop import end


def sweep(arguments: list[str]) -> None:
    """Runs a sweep. Raises ConfigError for what cannot be run, before the first trial."""
    config_dir, rest = take_option(arguments, "--config-dir")
    own = None if config_dir is None else Path(config_dir).expanduser().absolute()
    if {"-h", "--help"} & set(rest):
        sys.stdout.write(help_text(hydra_part.folders(own)))
        return
    overrides = [text for text in rest if text not in ("-m", "--multirun")]
    if len(overrides) == len(rest):
        raise ConfigError(
            "a sweep is many trainings, which -m says.",
            at="command line",
            do="write python launch/sweep.py -m ...; one training is launch/train.py.",
        )
    if own is not None and not own.is_dir():
        raise ConfigError(f"there is no folder {own}.", at="--config-dir", do="give the folder with your yaml files.")
    code = run(overrides, own)
    sys.stdout.flush()
    end(code)


def run(overrides: list[str], config_dir: Path | None) -> int:
    """The exit code: 0 when a trial has finished, 75 when it was stopped, 1 when every trial failed."""
    parts = hydra_part.split(overrides)
    typed = [text for text in parts.hydra if not text.startswith(f"{GROUP}.storage=")]  # it is written nowhere
    refuse_secrets([*parts.training, *typed], "command line")
    folders = hydra_part.folders(config_dir)
    space = hydra_part.space_file(parts.space, folders) if parts.space is not None else None
    locate = Locator(overrides, space)
    arguments = hydra_part.hydra_arguments(parts, config_dir)
    hydra_part.register()
    try:
        with hydra_part.initialised() as hydra:
            config = hydra_part.composed(hydra, arguments, locate)
            settings = hydra_part.settings_of(config, locate)
        make_plan(settings, parts.training, config_dir)  # its errors have places; Hydra's have not
        whole = [*arguments, *(admit_raw_key(text) for text in parts.training)]
        with hydra_part.initialised() as hydra:
            return finish(multirun(hydra, whole, locate))
    except ConfigError as error:
        raise located(error, locate) from None
    except (HydraException, OmegaConfBaseException) as error:
        first = str(error).strip().split("\n", 1)[0].rstrip(".")
        raise ConfigError(f"{first}.", at="command line", do="docs/sweeps.md has examples.") from None


def multirun(hydra: Any, arguments: list[str], locate: Locator) -> Any:
    """As Hydra.multirun does it, but the sweeper is ours: nothing that the config names is instantiated."""
    config = hydra_part.composed(hydra, arguments, locate)
    sweeper = TunesmithSweeper()
    context = HydraContext(config_loader=hydra.config_loader, callbacks=Callbacks())
    sweeper.setup(hydra_context=context, task_function=train_trial, config=config)
    return sweeper.sweep(list(config.hydra.overrides.task))


def finish(returned: Any) -> int:
    """Says what came of it; the exit code."""
    from tunesmith.launch.sweeping.driver import say
    from tunesmith.launch.sweeping.report import PAGE, show_table

    driver, result = returned
    show_table(result)
    for row in result.rows:
        if row.cause:
            say(f"trial {row.number} failed: {row.cause}")
    for command in driver.best_commands():
        say(f"the best again: {command}")
    say(f"report: {driver.folder / PAGE}")
    if driver.asked:
        say(f"{driver.asked}: stopped; the same command goes on")
        return EXIT_STOPPED
    if driver.budget_spent:
        say(f"{driver.budget_spent}: no further trial is started")
    if elsewhere := [row.number for row in result.rows if row.status == "running"]:
        say(f"{len(elsewhere)} trial(s) still run under another driver")
    if any(row.status == "finished" for row in result.rows) or elsewhere:
        return 0
    reasons = {row.cause for row in result.rows if row.cause}
    say(f"no trial has finished: {'; '.join(sorted(reasons)) or 'none was started'}")
    return 1


def help_text(folders: list[Path]) -> str:
    """What --help prints."""
    from tunesmith.launch import sweep as script

    names = sorted({path.stem for folder in folders for path in (folder / SEARCH_SPACES).glob("*.yaml")})
    comments = field_comments(SweeperConfig)
    settings = "\n".join(f"    {GROUP}.{name:<22} {comments[name]}" for name in SETTINGS)
    experiments = ", ".join(group_options("exp", folders))
    return (
        f"{script.__doc__}\nSearch spaces (+sweep=): {', '.join(names)}\nExperiments (+exp=): {experiments}\n\n"
        f"Settings:\n{settings}\n\ndocs/sweeps.md has the rest.\n"
    )
