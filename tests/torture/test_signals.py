"""A signal at any moment: the step is finished and saved, every rank exits with 75, and the run goes on bitwise."""

import json
from pathlib import Path

import pytest

STOPPED = 75
EVALUATED = ("data.validation_fraction=0.2", "evaluate.every_steps=3", "evaluate.generate=true")

later = pytest.mark.torture


@pytest.mark.row(13)
@pytest.mark.parametrize(
    ("faults", "saved"),
    [
        pytest.param("term:rank=1,step=4,phase=forward", 5, marks=(pytest.mark.slow, later)),
        pytest.param("int:rank=0,step=4,phase=backward", 5, marks=later),
        pytest.param("usr1:rank=1,step=4,phase=update", 5, marks=later),
        pytest.param("term:rank=0,step=4,phase=reading data", 5, marks=later),
        pytest.param("usr1:rank=0,step=4,phase=forward; term:rank=1,step=4,phase=update", 5, marks=later),
        pytest.param("term:rank=0,step=4,phase=forward; term:rank=0,step=5,phase=saving", 5, marks=later),
        pytest.param("int:rank=1,step=6,phase=evaluating", 6, marks=later),
        pytest.param("term:rank=1,step=6,phase=saving", 6, marks=later),
    ],
)
def test_a_signal_in_the_loop_saves_the_step_and_exits_75(
    start, left_alone, trained, losses, published, happened, tmp_path: Path, faults: str, saved: int
) -> None:
    job = start(*EVALUATED, faults=faults).wait()
    assert job.codes == {0: STOPPED, 1: STOPPED}, job.said[-3000:]
    assert max(published(tmp_path / "run")) == saved
    assert max(losses(tmp_path / "run")) == max(published(tmp_path / "run"))
    assert json.loads((tmp_path / "run/summary.json").read_text())["status"] == "stopped"
    assert "Traceback" not in job.said
    again = start(*EVALUATED).wait()
    assert again.codes == {0: 0, 1: 0}, again.said[-3000:]
    alone = left_alone(*EVALUATED)
    assert losses(tmp_path / "run") == losses(alone)
    assert trained(tmp_path / "run") == trained(alone)
    assert evaluations(tmp_path / "run") == evaluations(alone)
    happened(f"{faults}: exit 75, step {saved} saved, bitwise afterwards")


@pytest.mark.row(13)
@pytest.mark.torture
@pytest.mark.parametrize("phase", ["starting", "preparing the data", "loading the model"])
def test_a_signal_before_the_loop_ends_at_once_with_nothing_to_save(start, published, happened, tmp_path, phase):
    job = start(faults=f"term:phase={phase}").wait(30)
    assert job.codes == {0: STOPPED, 1: STOPPED}, job.said[-3000:]
    assert "Traceback" not in job.said
    assert published(tmp_path / "run") == []
    assert start().wait().codes == {0: 0, 1: 0}
    happened(f"{phase}: exit 75")


def evaluations(run_dir: Path) -> list[tuple[int, float]]:
    rows = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [(row["step"], row["eval/loss"]) for row in rows if "eval/loss" in row]
