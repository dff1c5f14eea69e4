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

from tunesmith.train.config.compose import compose_config
from tunesmith.train.data.prepare import prepare
from tunesmith.train.data.tokenizer import load_tokenizer
from tunesmith.train.ranks import distributed
from tunesmith.train.ranks.distributed import World
from tunesmith.train.ranks.state import Step
from tunesmith.train.run.loop import Loop
from tunesmith.train.run.setup import Run, set_up
from tunesmith.train.track.reporter import Reporter


class Recorder(Reporter):
    """Keeps what the loop tells, on every rank."""

    def __init__(self) -> None:
        super().__init__(None)
        self.steps: list[Step] = []
        self.learning_rates: list[float] = []
        self.warnings: list[str] = []
        self.evaluations: list[dict[str, float]] = []

    def step(self, state: Any, step: Step, **rest: float) -> None:
        self.steps.append(step)
        self.learning_rates.append(rest["learning_rate"])

    def warn(self, text: str) -> None:
        self.warnings.append(text)

    def evaluation(self, step: int, metrics: dict[str, float]) -> None:
        self.evaluations.append(metrics)

    @property
    def losses(self) -> list[float]:
        return [step.loss for step in self.steps]


class Rank:
    """What a function that runs on every rank needs."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.device = torch.device("cpu")
        self._num_runs = 0

    @contextlib.contextmanager
    def ready(self, overrides: list[str], run_dir: str | None = None) -> Iterator[tuple[Run, Recorder]]:
        """A run set up as launch/train.py does it, reporting to a Recorder; its engine is taken down afterwards.

        Its folder, unless given, is a new one in the pool's scratch folder (the working directory), on all ranks alike.
        """
        self._num_runs += 1
        folder = Path(run_dir or f"run-{self._num_runs}").absolute()
        config = compose_config(overrides).config
        tokenizer = load_tokenizer(config.model, config.data)
        data = prepare(config, tokenizer, show_progress=False)
        recorder = Recorder()
        run = set_up(config, self.world, self.device, folder, tokenizer, data, recorder)
        try:
            yield run, recorder
        finally:
            run.engine._engine.destroy()
            del run
            gc.collect()

    def train(self, overrides: list[str], run_dir: str | None = None) -> Recorder:
        """A whole run of the loop, without what follows it."""
        with self.ready(overrides, run_dir) as (run, recorder):
            Loop(run).train()
        return recorder

    def train_in_pieces(self, overrides: list[str], run_dir: str, stop_after: list[int]) -> dict[str, Any]:
        """A run left without a word after so many of its own steps, each time, and taken up again.

        Gives the loss of every step, the step at which each piece started, and how often the validation split was seen.
        """
        found: dict[int, float] = {}
        started_at, num_evaluations = [], 0
        for limit in [*stop_after, None]:
            with self.ready(overrides, run_dir) as (run, recorder):
                loop, first = Loop(run), run.state.step
                if limit is None:
                    loop.train()
                else:
                    run.engine.train()
                    for _ in range(limit):
                        step = loop._one_step()
                        if step is not None:
                            run.checkpoints.advance(step.verdict, run.state.step)
                        if loop._due(run.config.checkpoint.every_steps):
                            loop._save()
                found |= {first + index: loss for index, loss in enumerate(recorder.losses)}
                started_at.append(first)
                num_evaluations += len(recorder.evaluations)
        losses = [found[step] for step in range(len(found))]
        return {"losses": losses, "started_at": started_at, "num_evaluations": num_evaluations}


def load(file: str, loaded: dict[str, Any]) -> Any:
    if file not in loaded:
        spec = importlib.util.spec_from_file_location(Path(file).stem, file)
        assert spec is not None
        assert spec.loader is not None
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


if __name__ == "__main__":
    serve()
