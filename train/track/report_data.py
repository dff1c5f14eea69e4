"""What a report shows, read from the files a run leaves: metrics.jsonl, samples.jsonl, summary.json and config.yaml.

Any of them may be missing or incomplete, as after a crash.
"""

import itertools
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson
import yaml

from tunesmith.train.files.rows import read_rows
from tunesmith.train.files.run_folder import CONFIG, SUMMARY
from tunesmith.train.redact import redact
from tunesmith.train.track.console import duration, figure, spoken

Points = list[tuple[int, float]]


@dataclass(frozen=True)
class Line:
    """One curve: a metric and what it is called. `smooth` draws its moving average over the faint raw values."""

    metric: str
    label: str
    smooth: bool = False
    markers: bool = False


@dataclass(frozen=True)
class Chart:
    title: str
    lines: tuple[Line, ...]
    from_zero: bool = False  # the value axis starts at 0, where a cut axis would make noise look like a trend


CHARTS = (
    Chart("Loss", (Line("train/loss", "training", smooth=True), Line("eval/loss", "evaluation", markers=True))),
    Chart("Tokens per second", (Line("throughput/tokens_per_second", "all ranks", smooth=True),), from_zero=True),
    Chart("Learning rate", (Line("train/learning_rate", "learning rate"),), from_zero=True),
    Chart("Gradient norm", (Line("train/grad_norm", "before clipping", smooth=True),), from_zero=True),
)


@dataclass
class ReportedRun:
    """What the files of a run say."""

    name: str
    summary: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)

    @property
    def status(self) -> str:
        return str(self.summary.get("status", "unfinished"))

    def points(self, metric: str) -> Points:
        """The metric over the steps; where a step was logged twice, the later value."""
        values = {row["step"]: row[metric] for row in self.rows if isinstance(row.get(metric), int | float)}
        return sorted(values.items())

    def nonfinite_steps(self, metric: str) -> list[int]:
        return sorted({row["step"] for row in self.rows if row.get(f"{metric}_nonfinite")})

    def setting(self, dotted: str) -> Any:
        """A value of the config, or None."""
        return lookup(self.config, dotted)

    def result(self, dotted: str) -> Any:
        """A value of the summary, or None."""
        return lookup(self.summary, dotted)


def read_run(run_dir: Path) -> ReportedRun:
    """Raises FileNotFoundError where there is no run folder; a missing file in it is an empty part of the report."""
    if not run_dir.is_dir():
        raise FileNotFoundError(f"{run_dir} is no run folder.")
    summary_file, config_file = run_dir / SUMMARY, run_dir / CONFIG
    summary = orjson.loads(summary_file.read_bytes()) if summary_file.exists() else {}
    config = yaml.safe_load(config_file.read_text()) if config_file.exists() else {}
    samples = read_rows(run_dir / "samples.jsonl")
    last_step = max((row["step"] for row in samples), default=0)
    return ReportedRun(
        name=str(summary.get("name") or (config or {}).get("name") or run_dir.resolve().name),
        summary=redact(summary),
        config=redact(config or {}),
        rows=read_rows(run_dir / "metrics.jsonl"),
        samples=[row for row in samples if row["step"] == last_step],
    )


def lookup(mapping: dict[str, Any], dotted: str) -> Any:
    value: Any = mapping
    for key in dotted.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value


def headline(run: ReportedRun) -> list[tuple[str, str]]:
    """The figures one looks for first, those that there are."""
    wanted = [
        ("exact answers", "eval.exact_match", "exact_match"),
        ("token accuracy", "eval.token_accuracy", "accuracy"),
        ("evaluation loss", "eval.loss", "loss"),
        ("training loss", "train_loss", "loss"),
        ("tokens per second", "tokens_per_second", "tokens_per_second"),
        ("MFU", "mfu", "mfu"),
    ]
    tiles = [(label, figure(name, run.result(key))) for label, key, name in wanted if is_number(run.result(key))]
    if is_number(run.result("seconds")):
        tiles.append(("training time", duration(run.result("seconds"))))
    return tiles[:6]


def subtitle(run: ReportedRun) -> str:
    """What was trained, on what, in one line."""
    steps, world_size = run.result("steps"), run.result("world_size")
    model, adapter, stage = run.setting("model.name_or_path"), run.setting("adapter.kind"), run.setting("engine.stage")
    trained = {"none": "all weights", "lora": f"LoRA r={run.setting('adapter.r')}"}
    parts = [
        str(model).removeprefix("conf://") if model else None,
        trained.get(adapter, spoken(adapter)) if adapter else None,
        f"{steps:,} steps" if is_number(steps) else None,
        ("1 rank" if world_size == 1 else f"{world_size} ranks") if is_number(world_size) else None,
        None if stage is None else f"ZeRO {stage}",
        run.setting("engine.precision"),
    ]
    return "  ·  ".join(str(part) for part in parts if part)


RESULTS = ("train_loss", "tokens_per_second", "mfu", "peak_memory_gib", "skipped_steps")
LEFT_OUT = ("name", "status", "error", "seconds", *RESULTS)  # of the summary's plain values; they stand elsewhere


def result_rows(run: ReportedRun) -> list[tuple[str, str]]:
    """The final table."""
    rows = [(f"evaluation {words(name)}", shown(name, value)) for name, value in group(run.summary, "eval")]
    rows += [(f"best {words(name)}", shown(name, value)) for name, value in group(run.summary, "best")]
    rows += [(words(name), shown(name, run.summary[name])) for name in RESULTS if run.summary.get(name) is not None]
    if is_number(run.result("seconds")):
        rows.append(("training time", duration(run.result("seconds"))))
    return rows


def fact_rows(run: ReportedRun) -> list[tuple[str, str]]:
    """What the run was: its settings in words, then what else the summary holds."""
    batch, schedule, optimizer = (run.setting(name) or {} for name in ("batch", "schedule", "optimizer"))
    rows = []
    if "global_batch_size" in batch and "sequence_length" in batch:
        size = f"{batch['global_batch_size']} sequences of {batch['sequence_length']:,} tokens"
        rows.append(("batch", f"{size}, packing {batch.get('packing', '?')}"))
    if "kind" in schedule:
        length = f"{schedule['epochs']} epochs" if schedule.get("epochs") else f"{schedule.get('max_steps')} steps"
        rows.append(("schedule", f"{schedule['kind']}, {length}"))
    if "learning_rate" in optimizer:
        rows.append(("learning rate", f"{optimizer['learning_rate']:g}"))
    if run.setting("seed") is not None:
        rows.append(("seed", str(run.setting("seed"))))
    for name, value in run.summary.items():
        if isinstance(value, dict) and name not in ("eval", "best"):
            rows += [(f"{words(name)}: {words(key)}", shown(key, item)) for key, item in group(run.summary, name)]
        elif not isinstance(value, dict) and value is not None and name not in LEFT_OUT:
            rows.append((words(name), shown(name, value)))
    return rows


def group(summary: dict[str, Any], name: str) -> list[tuple[str, Any]]:
    """The entries of one group of the summary that hold something, nested ones under dotted names."""
    entries = summary.get(name)
    items: list[tuple[str, Any]] = []
    for key, item in entries.items() if isinstance(entries, dict) else []:
        if isinstance(item, dict):
            items += [(f"{key}.{inner}", nested) for inner, nested in group({key: item}, key)]
        elif item is not None:
            items.append((key, item))
    return items


def words(name: str) -> str:
    """A key as a person says it."""
    special = {
        "eval_loss": "evaluation loss",
        "mfu": "MFU",
        "peak_memory_gib": "peak memory (GiB)",
        "rouge_l": "ROUGE-L",
        "train_loss": "training loss",
        "world_size": "ranks",
    }
    return special.get(name) or spoken(name).removeprefix("num ")


def shown(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if is_number(value):
        return figure(name, value)
    return ", ".join(str(item) for item in value) if isinstance(value, list) else str(value)


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def moving_average(points: Points) -> Points:
    """The mean over a thirtieth of the run around each point; it does not lag behind, as a mean of the past would."""
    reach = max(1, len(points) // 60)
    sums = list(itertools.accumulate((value for _, value in points), initial=0.0))
    averaged = []
    for index, (step, _) in enumerate(points):
        near = min(reach, index, len(points) - 1 - index)  # the same on both sides
        averaged.append((step, (sums[index + near + 1] - sums[index - near]) / (2 * near + 1)))
    return averaged


def value_range(chart: Chart, series: list[Points]) -> tuple[float, float]:
    """Lowest and highest value that the axis of a chart must show."""
    values = [value for points in series for _, value in points]
    low, high = min(values), max(values)
    if low >= 0 and (chart.from_zero or low < 0.4 * high):
        low = 0.0
    return low, high


def nice_ticks(low: float, high: float, most: int) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten) from at or below low to at or above high, about `most` of them."""
    if high <= low:
        low, high = (low - 0.5, low + 0.5) if low == 0 else (low - abs(low) / 2, low + abs(low) / 2)
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{index * step:.12g}") for index in range(first, last + 1)]


def tick_labels(ticks: list[float]) -> list[str]:
    """The ticks of one axis, all written the same way."""
    largest = max(abs(tick) for tick in ticks)
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if largest >= 10 * size:
            return [f"{tick / size:,g}{unit if tick else ''}" for tick in ticks]
    if 0 < largest < 1e-3:
        exponent = math.floor(math.log10(largest))
        return [f"{tick / 10**exponent:.10g}e{exponent}" if tick else "0" for tick in ticks]
    return [f"{tick:,.10g}" for tick in ticks]


def thinned(points: Points, most: int = 600) -> Points:
    """At most about that many points, keeping the lowest and the highest of each stretch: spikes stay visible."""
    if len(points) <= most:
        return points
    stretch = -(-len(points) // (most // 2))
    kept: Points = []
    for start in range(0, len(points), stretch):
        piece = points[start : start + stretch]
        lowest, highest = (pick(piece, key=lambda point: point[1]) for pick in (min, max))
        kept += sorted({lowest, highest})
    return kept
