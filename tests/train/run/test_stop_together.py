"""One rank is asked to stop, at any place of the loop: all ranks save the same step, and the run goes on bitwise."""

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from matrices import covered

NUM_STEPS = 6


@pytest.fixture(scope="module")
def overrides(
    short_run: Callable[..., list[str]], make_model: Callable[..., Path], make_records: Callable[..., Path]
) -> list[str]:
    """A run with dropout and two forwards a step, that evaluates every three steps and saves every two."""
    own = ["schedule=cosine", "optimizer.learning_rate=3e-3", "checkpoint.every_steps=2"]
    own += [f"data.validation={make_records(9, seed=1)}", "evaluate.every_steps=3", "evaluate.batch_size=1"]
    return short_run(2, NUM_STEPS, *own, model=make_model(attention_dropout=0.1))


def piece(rank: Any, overrides: list[str], run_dir: str, fault: str = "", seconds_left: float = 0) -> dict[str, Any]:
    """On every rank: trains until the end or until it is stopped, by a fault of fault_plan.py or by its time limit."""
    from tunesmith.train.errors import Stopped
    from tunesmith.train.ranks.fault_plan import FaultPlan, parse
    from tunesmith.train.ranks.progress import progress
    from tunesmith.train.ranks.stop import SIGNALS, stop_request
    from tunesmith.train.run import agreed_stop
    from tunesmith.train.run.loop import Loop

    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    stopped, started, wall_clock = None, agreed_stop.STARTED, time.time
    try:
        with stop_request.listening(), rank.ready(overrides, run_dir) as (loop, recorder):
            first = loop.session.state.step
            if seconds_left:  # of the minute that the overrides give it
                agreed_stop.STARTED = time.monotonic() - 60 + seconds_left
                time.time = lambda: wall_clock() - 3600
                loop = Loop(loop.run, loop.session)
            progress.plan = FaultPlan([parse(part) for part in fault.split(";") if part], rank.world.rank)
            try:
                loop.train()
            except Stopped as caught:
                stopped = [caught.reason, caught.step]
            return {
                "first": first,
                "losses": recorder.losses,
                "evaluations": recorder.evaluations,
                "stopped": stopped,
                "checkpoints": loop.session.checkpoints.steps(),
                "seconds_left": loop.stop.limit.seconds_left(),
            }
    finally:
        agreed_stop.STARTED, time.time, progress.plan = started, wall_clock, None
        stop_request.forget()
        for number, handler in handlers.items():
            signal.signal(number, handler)


@pytest.fixture(scope="module")
def alone(ranks: Callable[[int], Any], overrides: list[str], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The run that was left alone, on both ranks."""
    return ranks(2).run(piece, overrides=overrides, run_dir=str(tmp_path_factory.mktemp("alone") / "run"))


PLACES = [  # what strikes, and the last step then done
    ("term:rank=1,step=1,phase=reading data", 2),
    ("int:rank=0,step=3,phase=forward", 4),
    ("usr1:rank=1,step=4,phase=update", 5),
    ("term:rank=1,step=3,phase=evaluating", 3),
    ("usr1:rank=0,step=3,phase=writing the model", 3),
    ("int:rank=1,step=4,phase=saving", 4),
    ("term:rank=1,step=6,phase=evaluating", 6),
    ("term:rank=0,step=2,phase=backward; int:rank=0,step=3,phase=saving; usr1:rank=1,step=3,phase=saving", 3),
]


@pytest.mark.row(13)
@pytest.mark.parametrize(("fault", "last_step"), covered(PLACES, PLACES[5:], PLACES[:5]))
def test_all_ranks_stop_at_the_step_that_is_done_and_the_run_goes_on_bitwise(
    ranks: Callable[[int], Any], overrides: list[str], alone: Any, tmp_path: Path, fault: str, last_step: int
) -> None:
    both = ranks(2).run(piece, overrides=overrides, run_dir=str(tmp_path / "run"), fault=fault)
    assert [found["stopped"][1] for found in both] == [last_step, last_step]
    struck = int(fault.split("rank=")[1][0])
    name = {"term": "SIGTERM", "int": "SIGINT", "usr1": "SIGUSR1"}[fault.partition(":")[0]]
    assert both[struck]["stopped"][0] == name
    assert both[0]["checkpoints"][-1] == last_step
    rest = ranks(2).run(piece, overrides=overrides, run_dir=str(tmp_path / "run"))
    for rank in (0, 1):
        assert rest[rank]["first"] == last_step
        assert rest[rank]["stopped"] is None
        assert both[rank]["losses"] + rest[rank]["losses"] == alone[rank]["losses"]
        assert both[rank]["evaluations"] + rest[rank]["evaluations"] == alone[rank]["evaluations"]
        assert len(alone[rank]["losses"]) == NUM_STEPS


def test_the_ranks_are_different_and_dropout_is_on(alone: Any) -> None:
    assert alone[0]["losses"] == alone[1]["losses"]
    assert len(set(alone[0]["losses"])) == NUM_STEPS
    assert len(alone[0]["evaluations"]) == 2


@pytest.mark.slow
@pytest.mark.torture
@pytest.mark.row(15)
def test_a_time_limit_stops_all_ranks_in_time_whatever_the_wall_clock_says(
    ranks: Callable[[int], Any], overrides: list[str], tmp_path: Path
) -> None:
    limited = [*overrides, "cluster.time_limit_minutes=1", "checkpoint.every_steps=1", "schedule.max_steps=1000"]
    slow = "slow:step=1,last_step=1000,phase=forward,seconds=0.25"  # a step is two forwards
    both = ranks(2).run(piece, overrides=limited, run_dir=str(tmp_path / "run"), fault=slow, seconds_left=18)
    for found in both:
        assert found["stopped"][1] == found["checkpoints"][-1] == len(found["losses"])
        assert 0 < found["seconds_left"] < 6
    assert both[0]["stopped"][0] == "cluster.time_limit_minutes=1"
    newest = tmp_path / f"run/checkpoints/step-{both[0]['checkpoints'][-1]:06d}/MANIFEST.json"
    assert json.loads(newest.read_text())["step"] == both[0]["stopped"][1]


def too_short(rank: Any, overrides: list[str], run_dir: str) -> str:
    """On every rank: what a limit says that has all but passed when the loop begins."""
    from tunesmith.train.errors import ConfigError
    from tunesmith.train.ranks.stop import stop_request
    from tunesmith.train.run import agreed_stop

    started = agreed_stop.STARTED
    agreed_stop.STARTED = time.monotonic() - 50
    stop_request.forget()
    try:
        with rank.ready(overrides, run_dir) as (loop, _):
            loop.train()
    except ConfigError as error:
        return str(error)
    finally:
        agreed_stop.STARTED = started
        stop_request.forget()
    return ""


def test_a_limit_that_is_over_before_the_first_step_is_a_mistake_on_every_rank(
    ranks: Callable[[int], Any], overrides: list[str], tmp_path: Path
) -> None:
    limited = [*overrides, "cluster.time_limit_minutes=1"]
    for said in ranks(2).run(too_short, overrides=limited, run_dir=str(tmp_path / "run")):
        assert "time_limit_minutes=1 is over before the first step: the start took 5" in said
        assert "cluster.time_limit_minutes" in said
    assert not list((tmp_path / "run").glob("checkpoints/*"))
