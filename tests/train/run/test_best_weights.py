"""What a run publishes is the weights of its best evaluation, bit for bit: not the last, and none a step later."""

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

SCRIPT, NUM_STEPS, BEST_STEP = [3.0, 1.0, 2.0], 6, 4  # evaluations after steps 2, 4 and 6
OWN = ["evaluate.every_steps=2", "evaluate.generate=false", "checkpoint.every_steps=2", "data.validation_fraction=0.2"]


def digests(tensors: dict[str, Any]) -> dict[str, str]:
    return {name: hashlib.sha256(tensor.numpy().tobytes()).hexdigest() for name, tensor in tensors.items()}


def published(rank: Any, overrides: list[str], run_dir: str, stop_after: list[int]) -> dict[str, Any]:
    """On every rank: the weights that were evaluated and those after each step of a run, which is left and resumed, and
    those it leaves.
    """
    from dataclasses import replace

    from safetensors.torch import load_file
    from worker import ScriptedObjective

    from tunesmith.train.answer.export import live_tensors, saved_names
    from tunesmith.train.run.finish import finish
    from tunesmith.train.run.loop import Loop

    evaluated, after_step = {}, {}

    def as_evaluated() -> Iterator[float]:
        for figure in SCRIPT:
            evaluated[loop.session.state.step] = live()
            yield figure

    script = as_evaluated()
    for limit in (*stop_after, NUM_STEPS):
        with rank.ready(overrides, run_dir) as (made, _):
            loop = Loop(replace(made.run, objective=ScriptedObjective(made, script)), made.session)
            engine = loop.session.engine
            names = saved_names(engine.module, loop.run.config)

            def live() -> dict[str, str]:
                return digests({names[name]: tensor.detach() for name, tensor in live_tensors(engine, names)})  # noqa: B023

            while loop.session.state.step < limit:
                loop.step()
                after_step[loop.session.state.step] = live()
            if limit == NUM_STEPS:
                loop.train()  # nothing is left to train: the end of a run
                finish(replace(loop.run, objective=made.run.objective), loop.session, loop.stop)
                at_end = live()
    (file,) = Path(run_dir, "model").glob("*.safetensors")
    return {"evaluated": evaluated, "after_step": after_step, "at_end": at_end, "in_file": digests(load_file(file))}


@pytest.mark.parametrize(
    ("world_size", "stage", "adapter", "stop_after"),
    [
        (1, 0, "none", [5]),
        (2, 2, "lora", []),
        pytest.param(2, 3, "none", [5], marks=pytest.mark.slow),
        pytest.param(2, 3, "lora", [4], marks=pytest.mark.slow),
    ],
)
def test_the_published_weights_are_those_of_the_best_evaluation(
    ranks: Callable[[int], Any],
    short_run: Callable[..., list[str]],
    tmp_path: Path,
    world_size: int,
    stage: int,
    adapter: str,
    stop_after: list[int],
) -> None:
    overrides = short_run(stage, NUM_STEPS, f"adapter={adapter}", *OWN, splits_all=True)
    arguments = {"overrides": overrides, "run_dir": str(tmp_path / "run"), "stop_after": stop_after}
    for found in ranks(world_size).run(published, **arguments):
        same = [int(step) for step, weights in found["after_step"].items() if weights == found["in_file"]]
        assert same == [BEST_STEP]
        assert found["evaluated"][str(BEST_STEP)] == found["in_file"]
        assert found["at_end"] == found["in_file"]  # what answers the questions and is proven
        assert len(found["after_step"]) == NUM_STEPS
