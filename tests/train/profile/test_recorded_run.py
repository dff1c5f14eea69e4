"""Steps of a real run recorded, on two ranks; and a run that records none."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import profile

from tunesmith.train.config.compose import compose_config
from tunesmith.train.errors import ConfigError
from tunesmith.train.profile.recorder import check, sample_metrics
from tunesmith.train.ranks.progress import progress

PAGE = ("profile=on", "profile.start_step=3", "profile.num_steps=2")


def recorded(rank: Any, *, overrides: list[str], run_dir: str) -> dict[str, Any]:
    metrics: dict[int, dict[str, float]] = {}
    with rank.ready(overrides, run_dir) as (loop, recorder):
        recorder.profiled = lambda step, found: metrics.update({step: found})
        loop.train()
        held = loop.session.engine.held_bytes()
        trainable = loop.session.size.trainable
    assert progress.listeners == []
    return {"losses": recorder.losses, "notes": recorder.notes, "metrics": metrics, "held": held, "weights": trainable}


@pytest.fixture(scope="module")
def runs(
    ranks: Callable[[int], Any], short_run: Callable[..., list[str]], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """A run with a page and samples, and the same without, on two ranks each."""
    folder = tmp_path_factory.mktemp("profiled")
    overrides = short_run(2, 6, "batch.micro_batch_size=2")
    given = [*overrides, *PAGE, "profile.every_steps=6"]
    on = ranks(2).run(recorded, overrides=given, run_dir=str(folder / "on"))
    off = ranks(2).run(recorded, overrides=overrides, run_dir=str(folder / "off"))
    return {"on": on, "off": off, "folder": folder}


def test_recording_changes_no_loss_and_writes_nothing_where_it_is_off(runs: dict[str, Any]) -> None:
    assert [rank["losses"] for rank in runs["on"]] == [rank["losses"] for rank in runs["off"]]
    assert len(runs["on"][0]["losses"]) == 6
    assert not (runs["folder"] / "off/profile").exists()
    assert runs["off"][0]["notes"] == []


def test_the_page_and_the_trace_of_rank_0_are_written_and_told(runs: dict[str, Any]) -> None:
    written = runs["folder"] / "on/profile"
    assert {path.name for path in written.iterdir()} == {"profile.html", "trace.json.gz"}
    events = json.loads(gzip.decompress((written / "trace.json.gz").read_bytes()))["traceEvents"]
    steps = [event["name"] for event in events if event["name"].startswith("tunesmith step")]
    assert sorted(steps) == ["tunesmith step 3", "tunesmith step 4"]
    assert any("LinearCrossEntropy" in event["name"] for event in events)
    page = (written / "profile.html").read_text()
    for part in (
        "rank 1",
        "GEMM",
        "attention",
        "Roofline",
        "at the peak",
        "gloo:all_reduce",
        "measured ceilings",
        "longer",
    ):
        assert part in page, part
    first, *advice = runs["on"][0]["notes"]
    assert first == f"profile of steps 3 to 4: {written / 'profile.html'}"
    assert advice
    assert runs["on"][1]["notes"] == []


def test_a_sample_gives_shares_of_the_step_that_are_the_same_on_all_ranks(runs: dict[str, Any]) -> None:
    first, second = (rank["metrics"] for rank in runs["on"])
    assert list(first) == ["6"]
    assert first == second
    shares = dict(first["6"])
    assert 0 <= shares.pop("profile/rank_wait_fraction") <= shares["profile/communication_fraction"]
    assert sum(shares.values()) == pytest.approx(1)
    assert shares["profile/forward_fraction"] > 0
    assert shares["profile/backward_fraction"] > 0


def test_a_sample_is_the_mean_over_ranks() -> None:
    def row(forward: float, communication: float) -> list[float]:
        return [forward, 0.1, 0.1, communication, 0.0, 0.0, 0.1, communication]

    found = sample_metrics([row(0.3, 0.4), row(0.6, 0.1)])
    assert found["profile/forward_fraction"] == pytest.approx(0.45)
    assert found["profile/communication_fraction"] == pytest.approx(0.25)
    assert found["profile/rank_wait_fraction"] == pytest.approx(0.15)


def test_the_memory_that_an_engine_keeps_is_that_of_its_weights_and_their_state(runs: dict[str, Any]) -> None:
    rank = runs["off"][0]
    of_one_rank = rank["weights"] / 2  # ZeRO 2: half of the masters and the two moments, in fp32
    assert rank["held"]["parameters"] == pytest.approx(4 * rank["weights"], rel=0.02)
    assert rank["held"]["optimizer state"] == pytest.approx(12 * of_one_rank, rel=0.02)


def ranges_of_a_step(rank: Any, *, overrides: list[str]) -> list[str]:
    with rank.ready(overrides) as (loop, _):
        loop.step()
        with profile() as found:
            loop.step()
        loop.profiler.close()
    return [event.name for event in found.events() if event.name.startswith("tunesmith")]


def test_a_step_that_is_not_recorded_has_no_ranges(
    ranks: Callable[[int], Any], short_run: Callable[..., list[str]]
) -> None:
    assert ranks(1).run(ranges_of_a_step, overrides=short_run(0, 6)) == [[]]
    waiting = short_run(0, 6, "profile=on", "profile.start_step=5", "profile.num_steps=1")
    assert ranks(1).run(ranges_of_a_step, overrides=waiting) == [[]]


def left_early(rank: Any, *, overrides: list[str], steps: int) -> int:
    def raise_error(step: int) -> None:
        raise RuntimeError(f"no data at {step}")

    with rank.ready(overrides) as (loop, _):
        for _ in range(steps):
            loop.step()
        loop.run.feed.batches = raise_error
        with pytest.raises(RuntimeError, match="no data"):
            loop.step()
    return len(progress.listeners)


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_a_run_that_is_left_in_a_recording_ends_it(
    ranks: Callable[[int], Any], short_run: Callable[..., list[str]], steps: int
) -> None:
    """In the step that warms it up, and in both that are recorded; the next run can record again."""
    overrides = short_run(0, 6, *PAGE)
    for _ in range(2):
        assert ranks(1).run(left_early, overrides=overrides, steps=steps) == [0]


def too_late(rank: Any, *, overrides: list[str]) -> str:
    with pytest.raises(ConfigError) as caught, rank.ready(overrides):
        pass
    return str(caught.value)


def test_steps_that_the_run_does_not_have_are_refused(
    ranks: Callable[[int], Any], short_run: Callable[..., list[str]]
) -> None:
    (said,) = ranks(1).run(too_late, overrides=short_run(0, 6, "profile=on"))
    assert "of steps 11 to 13, and the run has 6" in said
    assert "profile.start_step" in said


def test_nsys_is_refused_without_a_gpu() -> None:
    settings = compose_config(["+exp=debug", "profile=nsys"]).config.profile
    with pytest.raises(ConfigError, match="profile=on, which works on any device"):
        check(settings, torch.device("cpu"))
    check(settings, torch.device("cuda"))


@pytest.mark.parametrize(
    ("choice", "start", "every"), [("none", None, None), ("on", 11, None), ("sampled", None, 100), ("'on'", 11, None)]
)
def test_each_choice_is_taken(choice: str, start: int | None, every: int | None) -> None:
    settings = compose_config(["+exp=debug", f"profile={choice}"]).config.profile
    assert (settings.start_step, settings.every_steps) == (start, every)


@pytest.mark.parametrize(
    ("choice", "said"),
    [
        ("torch", "Did you mean on?"),
        ("off", "Did you mean none?"),
        ("true", "yaml reads on and off as true and false"),
    ],
)
def test_a_choice_that_there_is_not_leads_to_the_one_that_was_meant(choice: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose_config(["+exp=debug", f"profile={choice}"])
    assert said in str(caught.value)
    assert "choose one of none, nsys, on, sampled" in str(caught.value)


@pytest.mark.parametrize(("written", "error"), [('"on"', None), ("on", "with quotes in a file"), ("off", "quotes")])
def test_on_is_quoted_in_a_file(tmp_path: Path, written: str, error: str | None) -> None:
    (tmp_path / "exp").mkdir()
    text = f"# @package _global_\ndefaults:\n  - debug\n  - override /profile: {written}\n  - _self_\n"
    (tmp_path / "exp/mine.yaml").write_text(text)
    if error is None:
        assert compose_config(["+exp=mine"], tmp_path).config.profile.start_step == 11
        return
    with pytest.raises(ConfigError, match=error):
        compose_config(["+exp=mine"], tmp_path)
