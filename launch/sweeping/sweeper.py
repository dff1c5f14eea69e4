"""Hydra's sweeper plugin: Hydra composes a multirun and gives it here; what a sweep then does is the driver's."""

from typing import Any

from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict

from tunesmith.launch.sweeping.hydra_checks import BASIC
from tunesmith.launch.sweeping.hydra_launcher import HydraJobs, searched_folder
from tunesmith.launch.sweeping.hydra_part import check_trial
from tunesmith.launch.sweeping.places import LocalSlots, Place
from tunesmith.launch.sweeping.plan import Plan, claim_folder, make_plan
from tunesmith.launch.sweeping.settings import GROUP, SweeperConfig
from tunesmith.launch.sweeping.slurm_jobs import SlurmJobs
from tunesmith.launch.typed_secrets import is_secret
from tunesmith.train.config.compose import SEARCH_SPACES
from tunesmith.train.errors import ConfigError


class TunesmithSweeper(Sweeper):
    """Grid, random and Bayesian search over trainings."""

    def __init__(self) -> None:
        self._settings: SweeperConfig | None = None

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        settings = OmegaConf.to_object(config.hydra.sweeper)
        assert isinstance(settings, SweeperConfig)
        self._settings, self.config = settings, config
        self.hydra_context, self._task_function = hydra_context, task_function

    def sweep(self, arguments: list[str]) -> Any:
        """Runs the trials that are left. Returns the driver and the result; raises ConfigError before the first."""
        from tunesmith.launch.sweeping.driver import Driver
        from tunesmith.launch.sweeping.report import write_report
        from tunesmith.launch.sweeping.trials import Trials, check_storage

        assert self._settings is not None
        assert self.config is not None
        overrides = [text for text in arguments if text.lstrip("+").split("=", 1)[0] != SEARCH_SPACES]
        plan = make_plan(self._settings, overrides, searched_folder(self.config.hydra.searchpath))
        place = self._place(plan)
        for point in plan.space.corners():
            check_trial(plan.space.overrides(point), plan.config_dir)
        check_storage(plan.settings)
        claim_folder(plan)
        driver = Driver(plan, Trials(plan), place)
        driver.announce()
        driver.run()
        return driver, write_report(plan, driver.trials)

    def _place(self, plan: Plan) -> Place:
        assert self.config is not None
        assert self.hydra_context is not None
        launcher = self.config.hydra.launcher
        if launcher._target_ == BASIC:
            return SlurmJobs(plan) if plan.is_slurm else LocalSlots(plan)
        given = OmegaConf.to_container(self.config.hydra.sweeper, resolve=False)
        assert isinstance(given, dict)
        if is_secret(str(given["storage"])):
            raise ConfigError(
                "the database holds a password, which Hydra's launcher would write down.",
                at=f"{GROUP}.storage",
                do="leave it to ~/.pgpass or the like, or use cluster=slurm without hydra/launcher.",
            )
        with open_dict(self.config):
            self.config.hydra.sweep.dir = str(plan.folder / "hydra")
            self.config.hydra.sweep.subdir = "${hydra.job.num}"
        made = Plugins.instance().instantiate_launcher(
            hydra_context=self.hydra_context, task_function=self._task_function, config=self.config
        )
        return HydraJobs(plan, made, launcher)
