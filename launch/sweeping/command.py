"""The command line of launch/sweep.py: read, run, and its end said in words."""

import sys
from pathlib import Path

from tunesmith.launch.arguments import take_option
from tunesmith.launch.config_docs import field_comments
from tunesmith.launch.sweeping.driver import SweepDriver, say
from tunesmith.launch.sweeping.experiment import experiment_commands
from tunesmith.launch.sweeping.overrides import (
    CommandLine,
    errors_located,
    read_command_line,
    read_settings,
    search_spaces,
)
from tunesmith.launch.sweeping.plan import SweepPlan, claim_folder, make_plan
from tunesmith.launch.sweeping.report import PAGE, show_table, write_report
from tunesmith.launch.sweeping.result import SweepResult
from tunesmith.launch.sweeping.settings import GROUP, SETTINGS, SweeperConfig
from tunesmith.launch.sweeping.slots import LocalSlots, Slots
from tunesmith.launch.sweeping.slurm_slots import SlurmSlots
from tunesmith.launch.sweeping.submitit_slots import SubmititSlots, launcher_settings
from tunesmith.launch.sweeping.trials import Trials, check_storage
from tunesmith.train.config.compose import group_options
from tunesmith.train.errors import EXIT_STOPPED, ConfigError
from tunesmith.train.paths import CONF_DIR, user_path
from tunesmith.train.ranks.stop import end


def sweep(arguments: list[str], usage: str) -> None:
    """Runs a sweep. usage is the head of --help. Raises ConfigError for what cannot be run, before the first trial."""
    config_dir, rest = take_option(arguments, "--config-dir")
    own = None if config_dir is None else user_path(config_dir).absolute()
    if {"-h", "--help"} & set(rest):
        sys.stdout.write(help_text(usage, folders_of(own)))
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
    folders = folders_of(config_dir)
    line = read_command_line(overrides, folders)
    with errors_located(line):
        plan = make_plan(read_settings(line), line.training, config_dir)
        slots = slots_of(plan, line, folders)
        check_storage(plan.settings)
        claim_folder(plan)
        driver = SweepDriver(plan, Trials(plan), slots)
    driver.announce()
    driver.run()
    return finish(driver, write_report(plan, driver.trials))


def folders_of(config_dir: Path | None) -> list[Path]:
    return [CONF_DIR, *([config_dir] if config_dir else [])]


def slots_of(plan: SweepPlan, line: CommandLine, folders: list[Path]) -> Slots:
    """Where the trials run. Raises ConfigError."""
    launcher = line.values.get("hydra/launcher", "basic")
    settings = launcher_settings(launcher, line.settings("hydra.launcher"), folders)
    if launcher != "basic":
        return SubmititSlots(plan, launcher, settings)
    return SlurmSlots(plan) if plan.is_slurm else LocalSlots(plan)


def finish(driver: SweepDriver, result: SweepResult) -> int:
    """Says what came of it; the exit code."""
    show_table(result)
    for row in result.rows:
        if row.cause:
            say(f"trial {row.number} failed: {row.cause}")
    for command in experiment_commands(driver.plan, result.best).values():
        say(f"the best again: {command}")
    say(f"report: {driver.plan.folder / PAGE}")
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


def help_text(usage: str, folders: list[Path]) -> str:
    """What --help prints."""
    comments = field_comments(SweeperConfig)
    settings = "\n".join(f"    {GROUP}.{name:<22} {comments[name]}" for name in SETTINGS)
    experiments, spaces = ", ".join(group_options("exp", folders)), ", ".join(search_spaces(folders))
    return (
        f"{usage}\nSearch spaces (+sweep=): {spaces}\nExperiments (+exp=): {experiments}\n\n"
        f"Settings:\n{settings}\n\ndocs/sweeps.md has the rest.\n"
    )
