import json
import math
import re
import struct
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from tunesmith.train.track.report import write_report
from tunesmith.train.track.report_data import (
    Chart,
    moving_average,
    nice_ticks,
    read_run,
    thinned,
    tick_labels,
    value_range,
)

SUMMARY: dict[str, Any] = {
    "status": "finished",
    "name": "support_bot",
    "steps": 120,
    "train_loss": 0.1312,
    "eval": {"loss": 0.2134, "perplexity": 1.238, "token_accuracy": 0.957, "exact_match": 0.9375, "rouge_l": 0.971},
    "best": {"step": 100, "eval_loss": 0.21},
    "seconds": 171.2,
    "tokens_per_second": 21480.2,
    "mfu": None,
    "peak_memory_gib": 2.13,
    "world_size": 2,
    "data": {"num_records": 1204, "nested": {"files": ["a.jsonl", "b.jsonl"]}},
    "versions": {"torch": "2.13.0"},
}
CONFIG = """
name: support_bot
seed: 0
model: {name_or_path: conf://tiny}
adapter: {kind: lora, r: 16}
batch: {global_batch_size: 32, sequence_length: 256, packing: best_fit}
optimizer: {learning_rate: 0.002}
schedule: {kind: cosine, epochs: null, max_steps: 120}
engine: {stage: 2, precision: fp32}
hub: {token: kanarienvogel}
"""


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A finished run of 120 steps."""
    rows: list[dict[str, Any]] = []
    for step in range(1, 121):
        rows.append(
            {"step": step, "train/loss": 3 * math.exp(-step / 30), "train/learning_rate": 1e-3, "train/grad_norm": 1.5}
        )
        rows[-1]["throughput/tokens_per_second"] = 20000 + step
        if step % 20 == 0:
            rows.append({"step": step, "eval/loss": 3.2 * math.exp(-step / 30)})
    samples = [
        {"step": 60, "prompt": "an old sample", "expected": "x", "generated": "y", "exact": False},
        {"step": 120, "prompt": "How do I <b>pay</b>?", "expected": "By card.", "generated": "By card.", "exact": True},
        {
            "step": 120,
            "prompt": "Where?",
            "expected": "Here.",
            "generated": "</p><script>alert(1)</script>",
            "exact": False,
        },
    ]
    write_lines(tmp_path / "metrics.jsonl", rows)
    write_lines(tmp_path / "samples.jsonl", samples)
    (tmp_path / "summary.json").write_text(json.dumps(SUMMARY))
    (tmp_path / "config.yaml").write_text(CONFIG)
    return tmp_path


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def page(run_dir: Path) -> str:
    assert write_report(run_dir) == ""
    return (run_dir / "report.html").read_text()


class Tags(HTMLParser):
    """Collects the tags of a page with their attributes, and checks that they close in order."""

    EMPTY = frozenset({"meta", "line", "circle", "path"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self._open: list[str] = []
        self.feed(html)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.EMPTY:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag


def test_the_report_is_one_file_that_loads_nothing(run_dir: Path) -> None:
    html = page(run_dir)
    tags = Tags(html).tags
    for tag, attributes in tags:
        assert tag not in ("link", "img", "iframe", "object", "embed", "base")
        assert not {"src", "href", "srcset", "action", "xlink:href"} & set(attributes)
    assert "url(" not in html
    assert "@import" not in html
    assert not re.search(r"https?://", html)
    policies = [
        attributes["content"] for _, attributes in tags if attributes.get("http-equiv") == "Content-Security-Policy"
    ]
    assert len(policies) == 1
    assert "default-src 'none'" in str(policies[0])


def test_what_comes_from_the_run_is_escaped(run_dir: Path) -> None:
    html = page(run_dir)
    assert "<script>alert" not in html
    assert "&lt;/p&gt;&lt;script&gt;alert(1)&lt;/script&gt;" in html
    assert "How do I &lt;b&gt;pay&lt;/b&gt;?" in html
    assert [tag for tag, _ in Tags(html).tags].count("script") == 1


def test_a_hostile_name_is_escaped(run_dir: Path) -> None:
    (run_dir / "summary.json").write_text(
        json.dumps(SUMMARY | {"name": '"><script>x</script>', "status": "<i>", "error": "<u>"})
    )
    html = page(run_dir)
    assert not {"i", "u"} & {tag for tag, _ in Tags(html).tags}
    assert [tag for tag, _ in Tags(html).tags].count("script") == 1


def test_the_report_shows_results_facts_and_curves(run_dir: Path) -> None:
    html = page(run_dir)
    for text in ("93.8 %", "95.7 %", "0.2134", "21,480", "2:51 min", "finished", "1,204", "a.jsonl, b.jsonl", "2.13.0"):
        assert text in html, text
    assert "tiny · LoRA r=16 · 120 steps · 2 ranks · ZeRO 2 · fp32" in " ".join(html.split())
    figures = [attributes for tag, attributes in Tags(html).tags if tag == "figure"]
    lines = [line for figure in figures for line in json.loads(str(figure["data-lines"]))]
    assert {line["label"]: len(line["points"]) for line in lines} == {
        "training": 120,
        "evaluation": 6,
        "all ranks": 120,
        "learning rate": 120,
        "before clipping": 120,
    }
    assert html.count("MFU") == 0  # unknown, so not shown


def test_samples_of_the_last_step_are_marked_right_or_wrong(run_dir: Path) -> None:
    html = page(run_dir)
    assert (html.count("✓"), html.count("✗")) == (1, 1)
    assert "an old sample" not in html
    assert "Here." in html  # the expected answer beside a wrong one


def test_no_secret_of_the_config_is_shown(run_dir: Path) -> None:
    html = page(run_dir)
    assert "kanarienvogel" not in html
    assert "token: &#x27;***&#x27;" in html


def test_the_picture_is_a_png_of_1600_by_1000(run_dir: Path) -> None:
    assert write_report(run_dir) == ""
    content = (run_dir / "report.png").read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", content[16:24]) == (1600, 1000)
    assert 30_000 < len(content) < 400_000


@pytest.mark.parametrize("missing", ["metrics.jsonl", "samples.jsonl", "summary.json", "config.yaml"])
def test_a_missing_file_is_a_missing_part(run_dir: Path, missing: str) -> None:
    (run_dir / missing).unlink()
    assert "support_bot" in page(run_dir) or missing == "summary.json"
    assert (run_dir / "report.png").exists()


def test_an_empty_run_folder_still_gives_a_report(tmp_path: Path) -> None:
    assert "unfinished" in page(tmp_path)
    assert "<svg" not in page(tmp_path)


@pytest.mark.parametrize(
    "rows",
    [
        [{"step": 1, "train/loss": 2.0}],  # one point
        [{"step": step, "train/loss": 0.0} for step in range(1, 50)],  # no range
        [{"step": step, "train/loss": -1.5, "train/learning_rate": 2e-5} for step in range(1, 5)],
        [{"step": step, "train/loss": None, "train/loss_nonfinite": True} for step in range(1, 5)],
        [{"step": step, "train/loss": 1e30 * step} for step in range(1, 5)],
    ],
)
def test_curves_of_every_kind_are_drawn(run_dir: Path, rows: list[dict[str, Any]]) -> None:
    write_lines(run_dir / "metrics.jsonl", rows)
    html = page(run_dir)
    assert "nan" not in re.sub(r"<style>.*?</style>", "", html, flags=re.DOTALL)


def test_steps_that_were_not_finite_are_marked(run_dir: Path) -> None:
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 33, "train/loss": null, "train/loss_nonfinite": true}\n')
    assert "not finite at step 33" in page(run_dir)


def test_a_failed_run_says_why(run_dir: Path) -> None:
    (run_dir / "summary.json").write_text(json.dumps({"status": "failed", "error": "loss is not finite at step 33"}))
    html = page(run_dir)
    assert 'class="pill bad">failed' in html
    assert "loss is not finite at step 33" in html


def test_a_long_run_stays_small(run_dir: Path) -> None:
    write_lines(
        run_dir / "metrics.jsonl",
        [{"step": step, "train/loss": 1 + math.sin(step), "train/grad_norm": 1.0} for step in range(1, 50_001)],
    )
    assert len(page(run_dir)) < 200_000


def test_no_run_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no run folder"):
        write_report(tmp_path / "nowhere")


def test_the_later_of_two_values_of_a_step_counts(run_dir: Path) -> None:
    write_lines(
        run_dir / "metrics.jsonl", [{"step": 2, "a": 1.0}, {"step": 1, "a": 5.0}, {"step": 2, "a": 3.0, "b": 1.0}]
    )
    assert read_run(run_dir).points("a") == [(1, 5.0), (2, 3.0)]


def test_thinning_keeps_spikes() -> None:
    points = [(step, 1.0) for step in range(10_000)]
    points[7777] = (7777, 99.0)
    points[3333] = (3333, -99.0)
    kept = thinned(points, 100)
    assert len(kept) <= 200
    assert {(7777, 99.0), (3333, -99.0)} <= set(kept)
    assert kept == sorted(kept)


def test_the_moving_average_neither_lags_nor_leans() -> None:
    line = [(step, 3.0 * step) for step in range(600)]
    assert max(abs(value - 3.0 * step) for step, value in moving_average(line)) < 1e-9
    noise = [(step, (-1.0) ** step) for step in range(600)]
    assert max(abs(value) for _, value in moving_average(noise)[50:-50]) < 0.1


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0, 8, [0, 2, 4, 6, 8]),
        (0, 0.002, [0, 0.0005, 0.001, 0.0015, 0.002]),
        (1.2, 3.4, [1, 1.5, 2, 2.5, 3, 3.5]),
        (0, 0, [-0.6, -0.4, -0.2, 0, 0.2, 0.4, 0.6]),
    ],
)
def test_ticks_are_round_and_cover_the_range(low: float, high: float, ticks: list[float]) -> None:
    assert nice_ticks(low, high, 5) == ticks


@pytest.mark.parametrize(
    ("ticks", "labels"),
    [
        ([0, 5000, 10000], ["0", "5k", "10k"]),
        ([0, 1000, 2000], ["0", "1,000", "2,000"]),
        ([0, 1e-5, 2e-5], ["0", "1e-5", "2e-5"]),
        ([0, 0.0005, 0.001], ["0", "0.0005", "0.001"]),
        ([0, 0.2], ["0", "0.2"]),
    ],
)
def test_the_labels_of_an_axis_agree(ticks: list[float], labels: list[str]) -> None:
    assert tick_labels(ticks) == labels


@pytest.mark.parametrize(("values", "low"), [([2.0, 2.5], 2.0), ([0.1, 2.5], 0.0), ([-1.0, 2.5], -1.0)])
def test_the_axis_starts_at_zero_when_zero_is_near(values: list[float], low: float) -> None:
    points = [list(enumerate(values))]
    assert value_range(Chart("x", ()), points) == (low, 2.5)


def test_without_matplotlib_the_page_has_the_charts_and_a_sentence_says_what_is_missing(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert write_report(run_dir) == (
        "no report.png without matplotlib: pip install 'tunesmith[report]'; report.html has the charts"
    )
    assert not (run_dir / "report.png").exists()
    assert "<path" in (run_dir / "report.html").read_text()
