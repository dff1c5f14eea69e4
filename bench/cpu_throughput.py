"""Target tokens a second on a CPU: Tunesmith's loop against transformers.Trainer and trl.SFTTrainer.

    python bench/cpu_throughput.py        about four minutes on two idle cores; needs pip install 'tunesmith[bench]'

One model (conf/model/tiny, random weights of one seed), one data set (conf/data/example/train.jsonl), one sequence
length, fp32, one process. Every optimizer step of every contestant learns from about RECORDS_PER_STEP records:
    tunesmith    best-fit packing, as exp=support_bot has it
    trainer      transformers.Trainer with every record padded to sequence_length, as tutorials do
    sft_packed   trl.SFTTrainer with packing=True (best-fit decreasing) and completion_only_loss=True. It leaves out the
                 attention mask and restarts position_ids, from which transformers builds a block-diagonal mask for
                 sdpa: records do not see each other, as with us (checked here before the clocks start).
They take turns of STEPS_PER_TURN steps; `tunesmith` runs a second time as the control, which must read about 1.00.
Each rate is target tokens (labels that are learned) over seconds of wall time, data loading included, set-up not.
Logging is off on all sides, and each takes the micro batch size it is fastest with.
Memory is what training adds to a process of its own: the peak of its resident bytes from just before the model is made,
less the resident bytes then, so that imported libraries do not hide the difference; with as many rows a forward.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

from cpu_contestants import (
    RECORDS_PER_STEP,
    ROUNDS,
    SEQUENCE_LENGTH,
    SEQUENCES_PER_STEP,
    STEPS_PER_TURN,
    TOTAL_STEPS,
    WARM_UP_STEPS,
    Setting,
    sft_packed,
    trainer,
    tunesmith,
)
from measuring import Contestant, Sample, machine, ratios, resident

os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["DS_ACCELERATOR"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

MEMORY_STEPS = 3
SAME_LOSS = 0.05  # share by which the contestants' mean losses of the second half may differ: they draw other records
CONTROL_MARGIN = 0.05
RESULTS = Path(__file__).parent / "results" / "cpu_throughput.json"
CONTESTANTS = ("tunesmith", "sft_packed", "control", "trainer")
PACKAGES = ("torch", "deepspeed", "transformers", "trl", "accelerate", "datasets", "numpy")
BUILD = {"tunesmith": tunesmith, "control": tunesmith, "trainer": trainer, "sft_packed": sft_packed}


def take_turns(setting: Setting) -> dict[str, list[Sample]]:
    """The samples of each contestant, the warm-up first; the order is turned round in every other round."""
    # Ours last: accelerate would take the variables that we set for a launcher's and wrap its models.
    builds = sorted(CONTESTANTS, key=lambda name: BUILD[name] is tunesmith)
    contestants = {name: Contestant(BUILD[name](setting)) for name in builds}
    samples = {name: [contestants[name].turn(WARM_UP_STEPS)] for name in CONTESTANTS}
    for number in range(ROUNDS):
        for name in CONTESTANTS if number % 2 == 0 else CONTESTANTS[::-1]:
            samples[name].append(contestants[name].turn(STEPS_PER_TURN))
        rates = ", ".join(f"{name} {samples[name][-1].rate:,.0f}" for name in CONTESTANTS)
        print(f"round {number + 1}/{ROUNDS}: target tokens/s: {rates}", flush=True)
    for contestant in contestants.values():
        contestant.stop()
    return samples


def check_losses(samples: dict[str, list[Sample]]) -> dict[str, float]:
    """Mean loss of each contestant over the second half of its steps. Raises when one learns otherwise than we do."""
    means = {}
    for name, turns in samples.items():
        losses = [loss for turn in turns for loss in turn.losses]
        means[name] = statistics.fmean(losses[TOTAL_STEPS // 2 :])
        if not means[name] < losses[0] - 1:
            raise RuntimeError(f"{name} does not learn: {losses}")
        if abs(means[name] / means["tunesmith"] - 1) > SAME_LOSS:
            raise RuntimeError(f"{name} does not learn as tunesmith does: mean losses {means}")
    ours, again = ([turn.losses for turn in samples[name]] for name in ("tunesmith", "control"))
    if ours != again:
        raise RuntimeError("tunesmith and its control have different losses.")
    return means


def measure_memory(name: str, scratch: Path) -> dict[str, int]:
    """In a process of its own: a few steps of one contestant; trainer with as many rows a forward as tunesmith."""
    import_everything(name)
    setting = Setting(scratch)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak starts again from here
    before = resident("VmRSS")
    training = trainer(setting, SEQUENCES_PER_STEP) if name == "trainer" else BUILD[name](setting)
    contestant = Contestant(training)
    contestant.turn(MEMORY_STEPS)
    peak = resident("VmHWM")
    contestant.stop()
    return {"before_bytes": before, "peak_bytes": peak, "added_bytes": peak - before}


def import_everything(name: str) -> None:
    """What the contestant needs, so that it is resident before memory is counted."""
    import datasets
    import transformers.trainer  # noqa: F401

    if name == "sft_packed":
        import trl.trainer.sft_trainer  # noqa: F401
    if name in ("tunesmith", "control"):
        import tunesmith.train.run.loop  # noqa: F401
    datasets.disable_progress_bars()


def memory_in_a_process(name: str) -> dict[str, int]:
    """What measure_memory() finds."""
    command = [sys.executable, __file__, "--memory-of", name]
    # Without the names that distributed.start() set here, which accelerate would take for a launcher's.
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise RuntimeError(f"measuring the memory of {name} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


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


def report(setting: Setting, samples: dict[str, list[Sample]], means: dict[str, float]) -> dict[str, Any]:
    """All that was measured, as it goes into the JSON."""
    timed = {name: turns[1:] for name, turns in samples.items()}  # without the warm-up
    return {
        "what": "target tokens a second, one process, CPU",
        "command": "python bench/cpu_throughput.py",
        "machine": machine(PACKAGES),
        "shapes": {
            "model": setting.config.model.name_or_path,
            "parameters": sum(parameter.numel() for parameter in setting.model().parameters()),
            "dtype": str(setting.config.engine.precision),
            "sequence_length": SEQUENCE_LENGTH,
            "packed_sequences_per_step": SEQUENCES_PER_STEP,
            "padded_records_per_step": RECORDS_PER_STEP,
            "records": len(setting.rows),
            "fill": setting.data.train.fill,
        },
        "vs_trainer": ratios(timed["tunesmith"], timed["trainer"]),
        "vs_sft_packed": ratios(timed["tunesmith"], timed["sft_packed"]),
        "control": ratios(timed["tunesmith"], timed["control"]),
        "mean_loss_second_half": means,
        "warm_up": {name: asdict(turns[0]) for name, turns in samples.items()},
        "samples": {name: [asdict(turn) for turn in turns] for name, turns in timed.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory-of", choices=CONTESTANTS, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, default=RESULTS, help="where the JSON goes")
    options = parser.parse_args()
    require_packages()
    with tempfile.TemporaryDirectory() as folder:
        if options.memory_of:
            print(json.dumps(measure_memory(options.memory_of, Path(folder))))
            return
        import_everything("sft_packed")
        setting = Setting(Path(folder))
        samples = take_turns(setting)
        found = report(setting, samples, check_losses(samples))
    found["memory"] = {name: memory_in_a_process(name) for name in ("tunesmith", "trainer", "sft_packed")}
    found["peak_memory_ratio"] = found["memory"]["tunesmith"]["added_bytes"] / found["memory"]["trainer"]["added_bytes"]
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    for name in ("control", "vs_trainer", "vs_sft_packed"):
        print("{}: median {median:.2f}, {min:.2f} to {max:.2f}".format(name, **found[name]))
    if abs(found["control"]["median"] - 1) > CONTROL_MARGIN:
        print("The control is not 1.00: other processes disturbed the run, so trust none of it and run it again.")
    print(
        f"bench: vs_trainer={found['vs_trainer']['median']:.2f} vs_sft_packed={found['vs_sft_packed']['median']:.2f} "
        f"peak_memory_ratio={found['peak_memory_ratio']:.2f}"
    )


if __name__ == "__main__":
    main()
