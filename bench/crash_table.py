"""docs/crash_peer.md from bench/results/crash_peer.json."""

import json
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

from crash_setting import ACCUMULATION, MICRO_BATCH_SIZE, NUM_STEPS, SAFE_STEP, SAVE_EVERY, SAVED_STEP, STEPS_PER_EPOCH

NAMES = {"tunesmith": "Tunesmith", "trainer": "Trainer + DeepSpeed"}
SAME, OTHER = "bitwise the same", "other losses"
Part = dict[str, Any]
Group = tuple[str, list[str]]  # a row of a table, and the outcomes that it counts
Row = tuple[str, Callable[[str], str]]  # title, and the cell of a side

INTRO = f"""# Crashes, damage and attacks, side by side

Written by `{{command}}` from `bench/results/crash_peer.json`; do not edit. Both sides train the same tiny Llama (full
fine-tuning, fp32, attention dropout) on the same {{cpu}}-core machine without a GPU: two gloo ranks, micro batches of
{MICRO_BATCH_SIZE}, {ACCUMULATION} forwards a step, {STEPS_PER_EPOCH} steps an epoch, {NUM_STEPS} steps, a save every \
{SAVE_EVERY} steps, the last two kept. After each fault the same command is started
again, and once more if it ended with an error; nothing is mended by hand. "Bitwise" means: loss, token ids and
weights of every forward on both ranks up to the last step are those of a run that nothing happened to. Nothing here was
run on GPUs, on several machines or on a network file system.

Versions: {{versions}}. Tunesmith runs with its defaults beside the settings below; Trainer with `save_total_limit`,
`resume_from_checkpoint=get_last_checkpoint(output_dir)` as in transformers' example scripts, and DeepSpeed's own
checkpoints. Each reads its own files; where cells count, a column adds up to the number of faults.
"""

SWEEP = f"""
A save of step {SAVED_STEP} is under way, steps {SAFE_STEP - SAVE_EVERY} and {SAFE_STEP} are saved: going on from \
{SAVED_STEP} or {SAFE_STEP} loses at most one interval. Operations are opening for
writing, write, truncate, sync, rename, mkdir, unlink and rmdir below the checkpoints' folder, seen at the C library
(`bench/crash_at.c`); the process is killed with SIGKILL just before the operation. Not seen: the one rename in the
safetensors library's own file writer, a raw system call. An error loses no work by itself: older checkpoints are still
there for a person to go back to by hand, which was tried a few times (below).
"""


def markdown(found: Part) -> str:
    """The whole page."""
    versions = ", ".join(f"{name} {version}" for name, version in found["machine"]["versions"].items())
    sides = found["sides"]
    parts = [
        INTRO.format(command=found["command"], versions=versions, cpu=found["machine"]["cores"]),
        sweep_table(sides, "zero2"),
        SWEEP,
        sweep_table(sides, "zero3"),
        flip_table(sides),
        other_table(sides),
        details(sides),
        settings(found),
    ]
    return "\n".join(part for part in parts if part)


def table(head: str, sides: Iterable[str], rows: list[Row]) -> str:
    names = list(sides)
    lines = [f"| {head} | " + " | ".join(NAMES[name] for name in names) + " |", "|---" * (len(names) + 1) + "|"]
    lines += [f"| {title} | " + " | ".join(cell(name) for name in names) + " |" for title, cell in rows]
    return "\n".join(lines) + "\n"


def counted(outcomes: Iterable[str], groups: Iterable[Group]) -> Callable[[str], str]:
    """number(title) is how many there were of a group's. Raises ValueError for an outcome that is in none."""
    counts = Counter(outcomes)
    by_title = dict(groups)
    if unknown := set(counts) - {one for group in by_title.values() for one in group}:
        raise ValueError(f"no row of the table is for {unknown}.")
    return lambda title: str(sum(counts[one] for one in by_title[title]))


def went_on(step: int, how: str) -> str:
    return f"from step {step}, {how}"


SCRATCH = ("started from scratch, no error", [f"from scratch, {SAME}", f"from scratch, {OTHER}"])
ERROR, HUNG = ("ended with an error, twice", ["error"]), ("hung", ["hung"])
KILLED: list[Group] = [
    (f"went on from step {SAVED_STEP}, bitwise", [went_on(SAVED_STEP, SAME)]),
    (f"went on from step {SAFE_STEP}, bitwise", [went_on(SAFE_STEP, SAME)]),
    ("went on from an older step, bitwise", [went_on(step, SAME) for step in range(1, SAFE_STEP)]),
    ("went on with other losses, no error", [went_on(step, OTHER) for step in range(1, NUM_STEPS)]),
    SCRATCH,
    ERROR,
    HUNG,
]
FLIPPED: list[Group] = [
    ("seen: the checkpoint before is used, bitwise", [went_on(SAFE_STEP, SAME)]),
    ("seen: ended with an error, twice", ["error"]),
    ("loaded without a word, same losses and weights", [went_on(SAVED_STEP, SAME)]),
    ("loaded without a word, other losses or weights", [went_on(SAVED_STEP, OTHER), went_on(SAFE_STEP, OTHER)]),
    SCRATCH,
    HUNG,
]


def sweep_table(sides: Part, stage: str) -> str:
    there = {name: stages[stage]["sweep"] for name, stages in sides.items() if "sweep" in stages.get(stage, {})}
    if not there:
        return ""
    number = {name: counted((p["outcome"] for p in sweep["points"]), KILLED) for name, sweep in there.items()}
    every = {sweep["every"] for sweep in there.values()}
    which = "each" if every == {1} else f"every {max(every)}th (from a drawn one)"
    rows: list[Row] = [
        ("operations of the save, rank 0 + rank 1", lambda n: " + ".join(map(str, there[n]["operations"]))),
        ("kills, each followed by a restart", lambda n: str(len(there[n]["points"]))),
        *((title, lambda n, title=title: number[n](title)) for title, _ in KILLED),
    ]
    title = f"## SIGKILL at {which} file operation of a save, ZeRO {stage[-1]}\n\n"
    return title + table("after the kill, the same command", there, rows)


def flip_table(sides: Part) -> str:
    there = {name: stages["zero2"]["flips"] for name, stages in sides.items() if "flips" in stages.get("zero2", {})}
    if not there:
        return ""
    number = {name: counted((one["outcome"] for one in flips["found"]), FLIPPED) for name, flips in there.items()}
    count = max(flips["count"] for flips in there.values())
    rows: list[Row] = [(title, lambda n, title=title: number[n](title)) for title, _ in FLIPPED]
    note = (
        "\nEach flip is drawn over all bytes of all files of the newest checkpoint (seeded, each side its own).\n"
        "Trainer's restart with DeepSpeed does not read all of them (not model.safetensors, tokenizer, scripts): a\n"
        "flip there is harmless, and counts as loaded with the same losses and weights.\n"
    )
    return f"## One random bit of the newest checkpoint, {count} times\n\n" + table("a flip is", there, rows) + note


def other_table(sides: Part) -> str:
    there = {name: stages["zero2"] for name, stages in sides.items() if "mid_epoch" in stages.get("zero2", {})}

    has_zero3 = any("mid_epoch" in stages.get("zero3", {}) for stages in sides.values())

    def mid_epoch(name: str, stage: str) -> str:
        found = sides[name].get(stage, {}).get("mid_epoch")
        if not found:
            return ""
        return ", ".join(f"{what} {'same' if found[what] else 'other'}" for what in ("losses", "samples", "weights"))

    def full_disk(name: str) -> str:
        found = there[name]["full_disk"]
        return f"training {'went on' if found['went_on'] else 'ended'}; restart with space: {found['outcome']}"

    def hostile(name: str) -> str:
        found = there[name]["hostile_pickles"]
        return f"payload ran: {sum(one['ran'] for one in found)} of {len(found)} files"

    rows: list[Row] = [
        ("killed and resumed twice within an epoch, ZeRO 2", lambda n: mid_epoch(n, "zero2")),
        *([("the same, ZeRO 3", lambda n: mid_epoch(n, "zero3"))] if has_zero3 else []),
        ("disk full on rank 1 (RLIMIT_FSIZE)", full_disk),
        ("the file `latest` / `latest.json` missing", lambda n: there[n]["latest_missing"]["outcome"]),
        ("every file of every checkpoint cut to half", lambda n: there[n]["all_bad"]["outcome"]),
        ("a call before the pickle in each file that holds one", hostile),
    ]
    note = (
        "\nThe call is os.system, in opcodes that torch's weights_only reader knows too; Tunesmith's manifest was\n"
        "made to fit the changed file, so that its digests do not decide.\n"
    )
    return "## Other faults, ZeRO 2 unless said\n\n" + table("fault", there, rows) + note if there else ""


def details(sides: Part) -> str:
    lines = ["## What it said\n"]
    for name, stages in sides.items():
        found = stages.get("zero2", {})
        points = found.get("sweep", {}).get("points", [])
        errors = Counter(plain(point["message"]) for point in points if "message" in point)
        lines += [f"- {NAMES[name]}, {count} kills: `{message}`" for message, count in errors.most_common(4)]
        by_hand = Counter(point["by_hand"] for point in points if "by_hand" in point)
        lines += [
            f"- {NAMES[name]}, after such an error the newest folder removed by hand ({count} tried): {outcome}"
            for outcome, count in by_hand.items()
        ]
        for point in points:
            if point["outcome"].endswith(OTHER):
                what = f"rank {point['rank']} killed before `{point['what']}`"
                lines.append(f"- {NAMES[name]}, {what}: {point['outcome']}")
        for what in ("full_disk", "latest_missing", "all_bad"):
            if "message" in found.get(what, {}):
                lines.append(f"- {NAMES[name]}, {what.replace('_', ' ')}: `{plain(found[what]['message'])}`")
        for one in found.get("hostile_pickles", []):
            ran = "ran" if one["ran"] else "did not run"
            lines.append(f"- {NAMES[name]}, payload in `{one['file']}` {ran}; {one['outcome']}")
    return "\n".join(lines) + "\n"


def plain(message: str) -> str:
    """Without what differs from run to run; short."""
    text = message.split("]: ", 1)[-1] if message.startswith("[rank") else message
    return text.replace("`", "'")[:160]


def settings(found: Part) -> str:
    seconds = [
        f"{NAMES[name]} {stage.replace('zero', 'ZeRO ')}: {part['seconds']:.0f} s"
        for name, stages in found["sides"].items()
        for stage, part in stages.items()
    ]
    return (
        f"## Settings\n\nSeed {found['seed']}; {found['machine']['cpu']}; measured in {', '.join(seconds)} (on a "
        "machine that other work may share).\n\nTrainer:\n\n```json\n"
        f"{json.dumps(found['training_arguments'], indent=1)}\n```\n\nTunesmith:\n\n```\n"
        + "\n".join(found["overrides"])
        + "\n```\n"
    )
