"""Tunesmith's loop against transformers.Trainer and trl.SFTTrainer on a CPU: speed, memory and start-up.

    python bench/cpu_throughput.py                         make bench; needs pip install 'tunesmith[bench]'
    python bench/cpu_throughput.py --kinds tiny-full --rounds 4

Contestants, each in its own library's loop, fp32, one process, AdamW, the same weights and the same records in a step:
    tunesmith    best-fit packing, as exp=support_bot has it
    trainer      transformers.Trainer with every record padded to sequence_length, as tutorials do
    sft_packed   trl.SFTTrainer with packing=True (best-fit decreasing), completion_only_loss=True and its default loss,
                 a fused head in chunks. It leaves out the attention mask and restarts position_ids, from which
                 transformers builds a block-diagonal mask: records do not see each other, as with us (both checked).
Settings: the tiny model (conf/model/tiny) and one of 100 M parameters, full and LoRA (cpu_setting.py).
No time counts unless the losses of all contestants agree step by step. They take turns of one step; tunesmith runs a
second time as the control, which must read about 1.00. A rate is target tokens (labels that are learned) over seconds
of wall time, data loading included, set-up not; beside it the same over processor seconds, which other processes
disturb less. Logging is off on all sides, and each takes the micro batch size it is fastest with.
Memory is what training adds to a process of its own: the peak of its resident bytes from just before the model is made,
less the resident bytes then, so that imported libraries do not hide the difference; with as many rows a forward.
Start-up is seconds from the start of a process to the end of its first optimizer step, with nothing prepared before:
ours is launch/train.py, theirs bench/cpu_start.py (start_up.py).

The last line is of the tiny model, full fine-tuning:
    vs_trainer, vs_sft_packed   our target tokens a second over theirs (median of the rounds): higher is better
    peak_memory_ratio           memory that training adds, ours over trainer's: lower is better
    startup_ratio               start to first step, ours over the faster peer's: lower is better
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import start_up
from cpu_contestants import sft_packed, trainer, tunesmith
from cpu_setting import KINDS, MEMORY_STEPS, SEQUENCE_LENGTH, Setting
from measuring import Contestant, Sample, machine, on_the_cpu, ratios, resident

SAME_LOSS = 1e-5  # relative, of the loss of one step: sums run in other orders in fp32; found after 6 steps: 2e-7
CONTROL_MARGIN = 0.05
HEADLINE = "tiny-full"
GOALS = {"vs_trainer": 10.0, "vs_sft_packed": 1.6, "peak_memory_ratio": 0.5, "startup_ratio": 1.0}
RESULTS = Path(__file__).parent / "results" / "cpu_throughput.json"
CONTESTANTS = ("tunesmith", "sft_packed", "control", "trainer")
PACKAGES = ("torch", "deepspeed", "transformers", "trl", "peft", "accelerate", "datasets", "numpy")
BUILD = {"tunesmith": tunesmith, "control": tunesmith, "trainer": trainer, "sft_packed": sft_packed}


def take_turns(setting: Setting) -> dict[str, list[Sample]]:
    """The samples of each contestant, the warm-up first; the order is turned round in every other round."""
    # Ours last: accelerate would take the variables that we set for a launcher's and wrap its models.
    builds = sorted(CONTESTANTS, key=lambda name: BUILD[name] is tunesmith)
    contestants = {name: Contestant(BUILD[name](setting)) for name in builds}
    samples = {name: [contestants[name].turn(setting.kind.warm_up_steps)] for name in CONTESTANTS}
    for number in range(setting.kind.rounds):
        for name in CONTESTANTS if number % 2 == 0 else CONTESTANTS[::-1]:
            samples[name].append(contestants[name].turn(1))
    for contestant in contestants.values():
        contestant.stop()
    return samples


def check_losses(samples: dict[str, list[Sample]]) -> dict[str, Any]:
    """Our losses, and how far each contestant is from them. Raises when one learns otherwise than we do."""
    curves = {name: [loss for turn in turns for loss in turn.losses] for name, turns in samples.items()}
    ours = curves["tunesmith"]
    if not ours[-1] < ours[0] - 0.02:
        raise RuntimeError(f"nothing is learned: {ours}")
    off = {
        name: max(abs(theirs / mine - 1) for mine, theirs in zip(ours, curve, strict=True))
        for name, curve in curves.items()
        if name != "tunesmith"
    }
    if off["control"] or max(off.values()) > SAME_LOSS:
        raise RuntimeError(f"the contestants do not learn the same: {curves}")
    return {"losses": ours, "largest_difference": off}


def throughput(setting: Setting) -> dict[str, Any]:
    samples = take_turns(setting)
    losses = check_losses(samples)
    timed = {name: turns[1:] for name, turns in samples.items()}  # without the warm-up
    model = setting.model()
    rivals = {"vs_trainer": "trainer", "vs_sft_packed": "sft_packed", "control": "control"}
    return {
        **asdict(setting.kind),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "trainable": sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        "fill": setting.data.train.fill,
        "target_tokens_per_step": setting.data.train.num_target_tokens,
        **losses,
        **{name: ratios(timed["tunesmith"], timed[rival]) for name, rival in rivals.items()},
        "target_tokens_per_second": {
            name: statistics.median(turn.rate for turn in turns) for name, turns in timed.items()
        },
        "samples": {name: [asdict(turn) for turn in turns] for name, turns in timed.items()},
    }


def memory(setting: Setting, name: str) -> dict[str, int]:
    """Of a few steps of one contestant; trainer with as many rows a forward as tunesmith."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak starts again from here
    before = resident("VmRSS")
    training = trainer(setting, setting.kind.packed_sequences) if name == "trainer" else BUILD[name](setting)
    contestant = Contestant(training)
    contestant.turn(MEMORY_STEPS)
    peak = resident("VmHWM")
    contestant.stop()
    return {"before_bytes": before, "peak_bytes": peak, "added_bytes": peak - before}


def import_everything(name: str) -> None:
    """What the contestant needs, so that it is resident before memory is counted."""
    import datasets
    import transformers.trainer  # noqa: F401

    if name in ("sft_packed", "throughput"):
        import trl.trainer.sft_trainer  # noqa: F401
    if name in ("tunesmith", "throughput"):
        import tunesmith.train.run.loop  # noqa: F401
    datasets.disable_progress_bars()


def measure_here(what: str, kind: str, rounds: int | None) -> dict[str, Any]:
    import_everything(what)
    chosen = KINDS[kind] if rounds is None else replace(KINDS[kind], rounds=rounds)
    with tempfile.TemporaryDirectory() as folder:
        setting = Setting(chosen, Path(folder))
        return throughput(setting) if what == "throughput" else memory(setting, what)


def in_a_process(what: str, kind: str, rounds: int | None) -> dict[str, Any]:
    """What measure_here() finds, in a process of its own."""
    command = [sys.executable, __file__, "--measure", what, "--kinds", kind]
    command += ["--rounds", str(rounds)] if rounds else []
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"measuring {what} of {kind} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def measure_kind(kind: str, rounds: int | None) -> dict[str, Any]:
    found = in_a_process("throughput", kind, rounds)
    names = ("tunesmith", "trainer", "sft_packed")
    with ThreadPoolExecutor(2) as side_by_side:  # bytes know no hurry
        found["memory"] = dict(
            zip(names, side_by_side.map(lambda name: in_a_process(name, kind, rounds), names), strict=True)
        )
    added = {name: one["added_bytes"] for name, one in found["memory"].items()}
    found["memory_vs_trainer"] = added["tunesmith"] / added["trainer"]
    found["memory_vs_sft_packed"] = added["tunesmith"] / added["sft_packed"]
    shown = {name: found[name]["median"] for name in ("vs_trainer", "vs_sft_packed", "control")}
    shown |= {name: found[name] for name in ("memory_vs_trainer", "memory_vs_sft_packed")}
    print(f"{kind}: " + ", ".join(f"{name} {value:.2f}" for name, value in shown.items()), flush=True)
    if abs(shown["control"] - 1) > CONTROL_MARGIN:
        print(f"{kind}: the control is not 1.00: other processes disturbed the run, so trust none of it.", flush=True)
    return found


def require_packages() -> None:
    """Ends with a clear line when a peer is not installed."""
    missing = []
    for name in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            metadata.version(name)
            continue
        missing.append(name)
    if missing:
        sys.exit(f"cpu_throughput.py needs {', '.join(missing)}.\n  do: pip install 'tunesmith[bench]'")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", default=",".join(KINDS), help=f"of {', '.join(KINDS)}")
    parser.add_argument("--rounds", type=int, help="steps of each contestant; else as cpu_setting.py says")
    parser.add_argument("--starts", type=int, default=3, help="starts of each contestant")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, default=RESULTS, help="where the JSON goes")
    options = parser.parse_args()
    if unknown := set(options.kinds.split(",")) - set(KINDS):
        parser.error(f"there is no setting {', '.join(sorted(unknown))}; there are {', '.join(KINDS)}.")
    if HEADLINE not in options.kinds.split(",") and not options.measure:
        parser.error(f"the last line is of {HEADLINE}: name it too.")
    return options


def main() -> None:
    on_the_cpu()
    options = arguments()
    require_packages()
    if options.measure:
        print(json.dumps(measure_here(options.measure, options.kinds, options.rounds)))
        return
    found = {
        "what": "Tunesmith beside transformers.Trainer and trl.SFTTrainer: one process, CPU, fp32",
        "command": "python bench/cpu_throughput.py",
        "machine": machine(PACKAGES),
        "sequence_length": SEQUENCE_LENGTH,
        "kinds": {kind: measure_kind(kind, options.rounds) for kind in options.kinds.split(",")},
        "start_up": start_up.measure(options.starts),
    }
    headline = found["kinds"][HEADLINE]
    closing = {
        "vs_trainer": headline["vs_trainer"]["median"],
        "vs_sft_packed": headline["vs_sft_packed"]["median"],
        "peak_memory_ratio": headline["memory_vs_trainer"],
        "startup_ratio": found["start_up"]["ratio"],
    }
    found |= {"headline": HEADLINE, "goals": GOALS, "closing": closing}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print("bench: " + " ".join(f"{name}={value:.2f}" for name, value in closing.items()))


if __name__ == "__main__":
    main()
