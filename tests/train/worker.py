"""One rank of a pool (see conftest.py): runs functions of the test modules on request, all in one process group.

Each line of stdin is a task: {"file", "function", "arguments", "answer"}. The function gets a `Rank` and the arguments;
what it returns is written as JSON to <answer>.<rank>.
"""

import contextlib
import gc
import importlib.util
import json
import os
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator

from tunesmith.train.answer.evaluate import evaluate
from tunesmith.train.config.compose import compose_config
from tunesmith.train.config.config import Config, Precision
from tunesmith.train.data.prepare import prepare
from tunesmith.train.data.tokenizer import load_tokenizer
from tunesmith.train.model.kernel_choice import choose_kernels
from tunesmith.train.model.load import check_model
from tunesmith.train.model.packing import settle
from tunesmith.train.objective.objective import make_objective
from tunesmith.train.ranks import distributed
from tunesmith.train.ranks.distributed import World
from tunesmith.train.ranks.fault_plan import FaultPlan, parse
from tunesmith.train.ranks.progress import progress
from tunesmith.train.ranks.state import Step
from tunesmith.train.run import planned_faults
from tunesmith.train.run.loop import Loop
from tunesmith.train.run.setup import Run, make_run, open_session
from tunesmith.train.track.reporter import Reporter


class Recorder(Reporter):
    """Keeps what the loop tells, on every rank."""

    def __init__(self) -> None:
        super().__init__(None)
        self.steps: list[Step] = []
        self.learning_rates: list[float] = []
        self.warnings: list[str] = []
        self.notes: list[Any] = []
        self.evaluations: list[dict[str, float]] = []

    def step(self, state: Any, step: Step, **rest: float) -> None:
        self.steps.append(step)
        self.learning_rates.append(rest["learning_rate"])

    def warn(self, text: str) -> None:
        self.warnings.append(text)

    def note(self, text: Any) -> None:
        self.notes.append(text)

    def evaluation(self, step: int, metrics: dict[str, float]) -> None:
        self.evaluations.append(metrics)

    @property
    def losses(self) -> list[float]:
        return [step.loss for step in self.steps]


class ScriptedObjective:
    """A loop's objective, whose evaluations give the figures of a script; all else is real."""

    def __init__(self, loop: Loop, script: list[float], figure: str = "loss") -> None:
        self._loop = loop
        self._objective = loop.objective
        self._script, self._figure = iter(script), figure
        self.evaluated_at: list[int] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._objective, name)

    def metrics(self, totals: Any) -> dict[str, float]:
        self.evaluated_at.append(self._loop.session.state.step)
        return self._objective.metrics(totals) | {self._figure: next(self._script)}


class Rank:
    """What a function that runs on every rank needs."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.device = torch.device("cpu")
        self._num_runs = 0

    @contextlib.contextmanager
    def ready(
        self, overrides: list[str], run_dir: str | None = None, config_dir: Path | None = None
    ) -> Iterator[tuple[Loop, Recorder]]:
        """A loop at its start as launch/train.py makes it, reporting to a Recorder; its engine is closed afterwards.

        Its folder, unless given, is a new one in the pool's scratch folder (the working directory), on all ranks alike.
        """
        self._num_runs += 1
        folder = Path(run_dir or f"run-{self._num_runs}").absolute()
        config, recorder = compose_config(overrides, config_dir).config, Recorder()
        run = self.made(config, folder, recorder)
        loop = Loop(run, open_session(run))
        try:
            yield loop, recorder
        finally:
            loop.close()

    def made(self, config: Config, folder: Path, reporter: Reporter) -> Run:
        """A run whose data is prepared.

        DeepSpeed refuses fp16 on a CPU that has no instructions for it (AMX-FP16, AVX512-FP16). torch computes it in
        software there; the scaling of the loss is the same Python everywhere.
        """
        if config.engine.precision is Precision.fp16:
            get_accelerator().is_fp16_supported = lambda: True
        settle(config, check_model(config), self.device, reporter.note)
        tokenizer = load_tokenizer(config.model, config.data)
        objective = make_objective(config, tokenizer)
        data = prepare(config, tokenizer, objective, show_progress=False)
        parts: dict[str, Any] = {"tokenizer": tokenizer, "objective": objective, "data": data}
        parts |= {"kernels": choose_kernels(config, self.device), "reporter": reporter}
        return make_run(config, self.world, self.device, folder, **parts)

    @contextlib.contextmanager
    def faults(self, loop: Loop, text: str) -> Iterator[None]:
        """Inside, the faults of a plan like TUNESMITH_FAULTS strike this rank."""
        progress.plan = FaultPlan([parse(fault) for fault in text.split(";") if fault], self.world.rank)
        loop.objective = planned_faults.install(progress.plan, loop.objective, loop.session.engine.module)
        try:
            yield
        finally:
            progress.plan = None

    def evaluate(self, loop: Loop, batch_size: int) -> dict[str, float]:
        """The objective's figures of the training split."""
        engine, store = loop.session.engine, loop.run.data.train
        return evaluate(engine, loop.objective, store, batch_size=batch_size, world=self.world, pad_token_id=0)

    def train(self, overrides: list[str], run_dir: str | None = None) -> Recorder:
        """A whole run of the loop, without what follows it."""
        with self.ready(overrides, run_dir) as (loop, recorder):
            loop.train()
        return recorder

    def train_in_pieces(
        self, overrides: list[str], run_dir: str, stop_after: list[int], config_dir: Path | None = None
    ) -> dict[str, Any]:
        """A run left without a word after so many of its own steps, each time, and resumed.

        Gives the loss of every step, the step at which each piece started, every evaluation, and what the
        objective said of the last piece's steps.
        """
        found: dict[int, float] = {}
        started_at, evaluations = [], list[dict[str, float]]()
        for limit in [*stop_after, None]:
            with self.ready(overrides, run_dir, config_dir) as (loop, recorder):
                first = loop.session.state.step
                if limit is None:
                    loop.train()
                else:
                    for _ in range(limit):
                        loop.step()
                found |= {first + index: loss for index, loss in enumerate(recorder.losses)}
                started_at.append(first)
                evaluations += recorder.evaluations
        losses = [found[step] for step in range(len(found))]
        metrics = [step.metrics for step in recorder.steps]
        return {"losses": losses, "started_at": started_at, "evaluations": evaluations, "step_metrics": metrics}


def load(file: str, loaded: dict[str, Any]) -> Any:
    if file not in loaded:
        spec = importlib.util.spec_from_file_location(Path(file).stem, file)
        assert spec is not None
        assert spec.loader is not None
        sys.path.append(str(Path(file).parent))  # for what a test keeps in a file beside it
        loaded[file] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(loaded[file])
    return loaded[file]


def serve() -> None:
    world = distributed.world_from_environment()
    distributed.start(world, torch.device("cpu"), timeout_minutes=4)
    rank, loaded = Rank(world), dict[str, Any]()
    for line in sys.stdin:
        task = json.loads(line)
        answer = Path(f"{task['answer']}.{world.rank}")
        try:
            result = {"result": getattr(load(task["file"], loaded), task["function"])(rank, **task["arguments"])}
        except Exception:
            result = {"error": traceback.format_exc()}
        staged = answer.with_suffix(".staged" + answer.suffix)
        staged.write_text(json.dumps(result), encoding="utf-8")
        os.replace(staged, answer)
        del result
        gc.collect()
        gc.freeze()  # the next run's collector need not look at what this one leaves
