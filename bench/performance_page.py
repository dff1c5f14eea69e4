"""docs/performance.md from what the benches left in bench/results/; a figure that no JSON holds is said not to exist.

python bench/performance_page.py
"""

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

BENCH = Path(__file__).parent
RESULTS = BENCH / "results"
PAGE = BENCH.parent / "docs" / "performance.md"
Part = dict[str, Any]

INTRO = """# Performance

Written by `python bench/performance_page.py` from the JSON files in `bench/results/`; do not edit. How each figure is
taken stands in the help of its script. Ratios are medians over the rounds of one run in which the contestants take
turns; the control is Tunesmith against itself.
"""
CONTROL_MARGIN = 0.05  # of cpu_throughput.py
GOAL_WORDS = {
    "vs_trainer": ("target tokens/s over `transformers.Trainer`, padded", ">="),
    "vs_sft_packed": ("target tokens/s over `trl.SFTTrainer`, packed", ">="),
    "peak_memory_ratio": ("memory that training adds, over `transformers.Trainer`", "<="),
    "startup_ratio": ("start to first step, over the faster of the two", "<="),
}
NO_GPU = """No GPU has run this: **tokens/s, MFU, peak memory and start-up on a GPU, of Tunesmith or of any peer, do not
exist yet**, nor does any figure on several GPUs or nodes. `make bench-gpu-steps` takes those of one H200; what is to be
expected on many is a model, not a measurement: [scaling.md](scaling.md). The goals:
"""
NO_CPU = "\nNot measured yet: `make bench`.\n"
NO_GROWTH = "\nNot measured yet: `python bench/growth.py`.\n"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|", *(f"| {' | '.join(row)} |" for row in rows)]
    return "\n".join(lines) + "\n"


def verdict(found: float | None, wanted: float, sign: str) -> str:
    if found is None:
        return "not measured"
    return "met" if (found >= wanted if sign == ">=" else found <= wanted) else "**not met**"


def machine_line(machine: Part) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items() if version)
    return f"{machine['cpu']}, {machine['cores']} cores, {machine['torch_threads']} thread(s) a process. {versions}."


def megabytes(number: float) -> str:
    return f"{number / 1e6:,.0f} MB"


def cpu_section(found: Part) -> str:
    goals = [
        [words, f"{sign} {found['goals'][name]:g}", f"{found['closing'][name]:.2f}",
         verdict(found["closing"][name], found["goals"][name], sign)]
        for name, (words, sign) in GOAL_WORDS.items()
    ]  # fmt: skip
    intro = (
        f"\n{machine_line(found['machine'])} fp32, sequences of {found['sequence_length']} tokens. In every step each "
        "contestant has the same records and weights; their losses agree before a time counts. "
        "SFTTrainer packs (best-fit decreasing) and has its default loss, a fused head.\n\n"
        f"The last line of `make bench` ({found['headline']}):\n\n"
    )
    return intro + table(["", "goal", "found", ""], goals) + cpu_tables(found)


def cpu_tables(found: Part) -> str:
    kinds = found["kinds"]
    speed = [
        [
            kind,
            f"{one['parameters'] / 1e6:.1f} M",
            *(f"{one['target_tokens_per_second'][name]:,.0f}" for name in ("tunesmith", "sft_packed", "trainer")),
            *(_spread(one[name]) for name in ("vs_trainer", "vs_sft_packed")),
            _control(one),
            f"{max(one['largest_difference'].values()):.0e}",
        ]
        for kind, one in kinds.items()
    ]
    head = ["", "parameters", *(f"{name}, targets/s" for name in ("Tunesmith", "SFT packed", "Trainer padded"))]
    head += ["over Trainer", "over SFT packed", "control", "losses differ by"]
    processor = [
        [kind, *(f"{one[name]['cpu_median']:.2f}" for name in ("vs_trainer", "vs_sft_packed", "control"))]
        for kind, one in kinds.items()
    ]
    memory = [
        [
            kind,
            *(megabytes(one["memory"][name]["added_bytes"]) for name in ("tunesmith", "sft_packed", "trainer")),
            f"{one['memory_vs_trainer']:.2f}",
            f"{one['memory_vs_sft_packed']:.2f}",
        ]
        for kind, one in kinds.items()
    ]
    start = found["start_up"]
    starts = [
        [words, *(f"{start[unit][name]:.1f} s" for name in ("tunesmith", "sft_packed", "trainer"))]
        for words, unit in (("wall", "seconds"), ("processor", "cpu_seconds"))
    ]
    peers = ["Tunesmith", "SFT packed", "Trainer padded"]
    return (
        "\nSpeed: median (least to most) of the rounds.\n\n"
        + table(head, speed)
        + "\nThe same ratios over processor seconds, which other processes on the machine disturb less.\n\n"
        + table(["", "over Trainer", "over SFT packed", "control"], processor)
        + "\nMemory that training adds to a process at its peak. Trainer has as many rows a forward as Tunesmith, SFT "
        "packed the one it is fastest with; weights, gradients and moments are most of it for the larger model.\n\n"
        + table(["", *peers, "over Trainer", "over SFT packed"], memory)
        + "\nStart-up: from the start of the process to the end of the first step, nothing prepared before.\n\n"
        + table(["", *peers], starts)
    )


def _control(kind: Part) -> str:
    spread = _spread(kind["control"])
    off = abs(kind["control"]["median"] - 1)
    return f"**{spread}: disturbed by other processes, trust none of this row**" if off > CONTROL_MARGIN else spread


def _spread(ratio: Part) -> str:
    return f"{ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})"


def growth_section(found: Part) -> str:
    margin = found["margins"]["cpu_seconds"]
    parts = [
        f"\n{machine_line(found['machine'])} The real loop, a llama of random weights, LoRA, fp32. An exponent e says "
        "that a column grows as (axis)^e. Time must grow no faster than the operations that the step cannot do without "
        f"(+ {margin:g}), and what is kept for the backward no faster than the last column.\n\n"
    ]
    rows = [
        [
            axis["title"],
            f"{axis['rows'][0]['at']:,} to {axis['rows'][-1]['at']:,}",
            *(f"{axis['exponents'][column]:.2f}" for column in ("cpu_seconds", "needed", "saved_bytes")),
            f"{found['most_bytes'][name]:g}",
            ", ".join(f"**{column}**" for column in axis["faster_than_it_must"]) or "none",
        ]
        for name, axis in found["axes"].items()
    ]
    head = ["axis", "from, to", "time", "operations needed", "saved bytes", "at most", "grows faster than it must"]
    parts.append(table(head, rows))
    points = [
        [
            name,
            f"{row['at']:,}",
            f"{row['tokens'] / row['cpu_seconds']:,.0f}",
            megabytes(row["saved_bytes"]),
            megabytes(row["peak_bytes"]) if name == "ranks" else "-",
        ]
        for name, axis in found["axes"].items()
        for row in axis["rows"]
    ]
    head = ["axis", "at", "tokens per processor second", "saved bytes of a rank", "added to rank 0 at its peak"]
    return "".join(parts) + "\nThe points.\n\n" + table(head, points)


def gpu_section(found: Part | None, goals: Sequence[Part]) -> str:
    if found is None or not found["measures"]:
        rows = [[goal["what"], goal["at"], _wanted(goal), "does not exist yet"] for goal in goals]
        return "\n" + NO_GPU + "\n" + table(["", "case", "goal", "found"], rows)
    machine = found["machine"]
    rows = [
        [goal["what"], goal["at"], _wanted(goal), "-" if goal["found"] is None else f"{goal['found']:.3g}",
         goal["verdict"]]
        for goal in found["goals"]
    ]  # fmt: skip
    cases = [
        [case, name, *(_number(one.get(column)) for column in ("tokens_per_second", "peak_bytes", "control"))]
        for case, result in found["cases"].items()
        for name, one in result["contestants"].items()
    ]
    absent = "".join(f"Absent: {name}: {why}\n" for name, why in found["absent"].items())
    return (
        f"\n{machine['gpu']}, driver {machine['driver']}, CUDA {machine['cuda']}; `{found['command']}`.\n\n"
        + table(["", "case", "goal", "found", ""], rows)
        + "\n"
        + table(["case", "contestant", "tokens/s", "peak bytes", "control"], cases)
        + ("\n" + absent if absent else "")
    )


def _wanted(goal: Part) -> str:
    return f"{'>=' if goal['at_least'] else '<='} {goal['wanted']:g}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.4g}"


def markdown(cpu: Part | None, growth: Part | None, gpu: Part | None, goals: Sequence[Part]) -> str:
    """The whole page; None is what was not measured, goals those of the GPU bench."""
    return "\n".join(
        [
            INTRO,
            "## On a CPU, beside Trainer and TRL",
            cpu_section(cpu) if cpu else NO_CPU,
            "## On a GPU",
            gpu_section(gpu, goals),
            "## How the cost of a step grows",
            growth_section(growth) if growth else NO_GROWTH,
        ]
    )


def read(path: Path) -> Part | None:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def main() -> None:
    from gpu_steps import planned_goals

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", type=Path, default=PAGE, help="where the page goes")
    options = parser.parse_args()
    parts = [read(RESULTS / f"{name}.json") for name in ("cpu_throughput", "growth", "gpu_steps")]
    options.page.write_text(markdown(*parts, planned_goals()), encoding="utf-8")


if __name__ == "__main__":
    main()
