"""What the GPU benches share: calls that take turns under CUDA events, peak memory, goals, results, a time budget.

With --device cpu --tiny everything runs end to end without a GPU: clocks of the host, no memory, and no claim to speed.
"""

import argparse
import json
import os
import shutil
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from tunesmith.kernels.pick_cache import driver_version

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "triton", "liger-kernel", "quack-kernels", "cut-cross-entropy", "peft", "transformers", "numpy")
CONTROL_MARGIN = 0.03

Call = Callable[[int], object]  # given the number of the turn, by which it takes its inputs


@dataclass
class Goal:
    """What an issue asks for, and what came out."""

    what: str
    at: str  # the case
    wanted: float
    found: float | None  # None: not measured
    at_least: bool = True

    @property
    def verdict(self) -> str:
        if self.found is None:
            return "not measured"
        return "met" if (self.found >= self.wanted if self.at_least else self.found <= self.wanted) else "NOT MET"

    def line(self) -> str:
        found = "-" if self.found is None else f"{self.found:.3g}"
        return f"{self.verdict:12} {self.what}, {self.at}: {found} ({'>=' if self.at_least else '<='} {self.wanted:g})"


@dataclass
class Budget:
    """Seconds that a script may take: the most important case comes first and always runs; what is cut is named."""

    seconds: float
    started: float = field(default_factory=time.monotonic)
    cut: list[str] = field(default_factory=list)

    def each(self, cases: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
        """The cases for which there is time, judged by the one before: the first one compiles for all."""
        last = 0.0
        for name, case in cases:
            begun = time.monotonic()
            if last and begun + last > self.started + self.seconds:
                self.cut.append(name)
                continue
            yield name, case
            last = time.monotonic() - begun


def arguments(doc: str | None, seconds: float) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small shapes, to see that the script works")
    parser.add_argument("--seconds", type=float, default=seconds, help="stop before this, the rest is named as cut")
    parser.add_argument("--output", type=Path, help="where the JSON goes; bench/results/ without it")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no GPU here; --device cpu --tiny only shows that the script works.")
    if options.device == "cpu" and not options.tiny:
        parser.error("--device cpu goes with --tiny: it measures nothing, it shows that the script works.")
    options.device = torch.device(options.device)
    return options


def take_turns(calls: Mapping[str, Call], device: torch.device, *, rounds: int, warm_up: int = 2) -> dict[str, Any]:
    """Milliseconds of each call: median, least, most. Rounds go through all calls, every other one backwards.

    The inputs of a turn are the caller's to rotate: with its number, so that no call finds its own in the L2 cache.
    """
    for turn in range(warm_up):
        for call in calls.values():
            call(turn)
    taken: dict[str, list[Any]] = {name: [] for name in calls}
    for turn in range(rounds):
        for name in list(calls) if turn % 2 == 0 else list(calls)[::-1]:
            taken[name].append(_timed(calls[name], turn, device))
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    times = {name: [clock() for clock in clocks] for name, clocks in taken.items()}
    return {
        name: {"ms": statistics.median(ms), "least": min(ms), "most": max(ms), "rounds": rounds}
        for name, ms in times.items()
    }


def _timed(call: Call, turn: int, device: torch.device) -> Callable[[], float]:
    """Runs the call; what is returned tells the milliseconds, once the device is done."""
    if device.type != "cuda":
        started = time.perf_counter()
        call(turn)
        taken = 1000 * (time.perf_counter() - started)
        return lambda: taken
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call(turn)
    end.record()
    return lambda: start.elapsed_time(end)


def peak_extra_bytes(call: Call, device: torch.device) -> int | None:
    """What a call adds to the allocated bytes at its peak, results included; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call(0)
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def error(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Relative norm of the difference, computed in pieces: the exact one is float64 and may take gigabytes."""
    found, exact = torch.atleast_1d(found), torch.atleast_1d(exact)
    rows = max(1, 2**26 // exact[:1].numel())
    squares = total = 0.0
    for mine, right in zip(found.split(rows), exact.split(rows), strict=True):
        squares += float((mine.double() - right).square().sum())
        total += float(right.double().square().sum())
    return (squares / (total or 1.0)) ** 0.5


def first_line(problem: BaseException) -> str:
    lines = str(problem).strip().splitlines()
    return f"{type(problem).__name__}: {lines[0] if lines else ''}"[:200]


def machine(device: torch.device) -> dict[str, Any]:
    """GPU and versions; nothing that tells whose machine it is."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    if device.type != "cuda":
        return {"gpu": None, "versions": versions}
    gpu = torch.cuda.get_device_properties(device)
    return {
        "gpu": gpu.name,
        "multiprocessors": gpu.multi_processor_count,
        "memory_bytes": gpu.total_memory,
        "driver": driver_version(),
        "cuda": torch.version.cuda,
        "versions": versions,
    }


def finish(
    name: str, options: argparse.Namespace, found: dict[str, Any], goals: Sequence[Goal], budget: Budget, summary: str
) -> None:
    """Writes the JSON, to $OUT as well, then prints goals, the table, and what was cut."""
    if options.device.type != "cuda":  # times of tiny shapes on a CPU are no measurement
        for goal in goals:
            goal.found = None
    whole = {
        "command": f"python bench/{name}.py --seconds {budget.seconds:g}",
        "measures": options.device.type == "cuda",
        "machine": machine(options.device),
        **found,
        "goals": [{**asdict(goal), "verdict": goal.verdict} for goal in goals],
        "cut": budget.cut,
        "seconds": time.monotonic() - budget.started,
    }
    output = options.output or RESULTS / f"{name}{'' if options.device.type == 'cuda' else '_tiny'}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    if os.environ.get("OUT"):
        shutil.copy(output, Path(os.environ["OUT"]) / f"{name}.json")
    print(summary)
    for goal in goals:
        if goal.found is not None:
            print(goal.line())
    if budget.cut:
        print(f"cut for time: {', '.join(budget.cut)}")
    kinds = [goal.verdict for goal in goals]
    print(
        f"{name}: goals met {kinds.count('met')}/{len(kinds)}, not measured {kinds.count('not measured')}, "
        f"{whole['seconds']:.0f} s, {output}"
    )


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Columns of text, as wide as they have to be."""
    cells = [[cell if isinstance(cell, str) else format_number(cell) for cell in row] for row in (head, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in cells)
    return "\n".join(line.rstrip() for line in lines)


def format_number(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.3g}" if isinstance(value, float) else str(value)
