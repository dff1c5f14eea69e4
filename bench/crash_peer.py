"""Crashes, damage and attacks: Tunesmith against transformers.Trainer with DeepSpeed, on the same work.

    python bench/crash_peer.py    under 25 minutes on two idle cores; needs pip install 'tunesmith[bench]' and gcc

One model, one set of rows, nine steps on two gloo ranks with dropout and two forwards a step, saved every two steps,
the last two saves kept. A rank is killed at the file operations of the third save, bits of the newest checkpoint are
flipped, a disk is full, files are missing or hostile; each time the same command is started again, as a careful user
or a scheduler would, and nothing is mended by hand. What it did is judged by what its ranks saw: step, loss, token ids
and weights of every forward, bit by bit, against a run that nothing happened to. CPU only.

File operations are counted and struck below Python (crash_at.c, LD_PRELOAD). Ranks are forked from a process that has
imported everything (crash_ranks.py) and watched as torchrun does; a run under torchrun itself must leave the same
weights. Writes bench/results/crash_peer.json and docs/crash_peer.md (crash_table.py).
"""

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import crash_table
from crash_faults import SEED, Faults
from crash_jobs import Side, environment, free_port
from crash_setting import ROOT, RUN, SIDES, WORLD_SIZE, make_setting, overrides, training_arguments
from measuring import machine

RESULTS = ROOT / "bench/results/crash_peer.json"
TABLE = ROOT / "docs/crash_peer.md"
PACKAGES = ("torch", "deepspeed", "transformers", "accelerate", "safetensors", "numpy")
NUM_FLIPS = 100
SWEEP_EVERY = {2: 1, 3: 4}  # ZeRO stage -> every which file operation


def build_shim(scratch: Path) -> Path:
    """crash_at.c as a library. Ends the script where there is no compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        sys.exit("crash_peer.py needs a C compiler for crash_at.c.\n  do: apt-get install gcc")
    target = scratch / "crash_at.so"
    source = ROOT / "bench/crash_at.c"
    subprocess.run([compiler, "-O2", "-shared", "-fPIC", "-o", str(target), str(source), "-ldl"], check=True)
    return target


def say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)


def weights_of(run: Path) -> str:
    """SHA-256 of the model that a run has left behind."""
    files = sorted((run / "model").glob("*.safetensors"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def under_torchrun(side: str, setting: Path, stage: int, scratch: Path) -> str:
    """A whole run with the real launcher; the weights it leaves."""
    folder = scratch / f"torchrun-{side}-{stage}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    if side == "trainer":
        script = [str(ROOT / "bench/crash_trainer.py"), str(setting), str(stage), str(folder / "trace")]
    else:
        script = [str(ROOT / "launch/train.py"), *overrides(setting, stage)]
    program = str(Path(sys.executable).with_name("torchrun"))
    command = [program, "--nproc_per_node", str(WORLD_SIZE), "--master_port", str(free_port()), *script]
    done = subprocess.run(command, cwd=folder, env=environment(scratch), capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"torchrun {side} ended with {done.returncode}:\n{done.stdout[-1500:]}{done.stderr[-3000:]}")
    return weights_of(folder / RUN)


def measure(name: str, stage: int, setting: Path, scratch: Path, shim: Path) -> dict[str, Any]:
    """Everything that is done to one side at one ZeRO stage."""
    started = time.monotonic()
    launched = under_torchrun(name, setting, stage, scratch)
    say(f"{name} ZeRO {stage}: a run under torchrun: {time.monotonic() - started:.1f} s")
    side = Side(name, setting, stage, scratch, shim)
    try:
        faults = Faults(side, say)
        if weights_of(faults.undisturbed) != launched:
            raise RuntimeError(f"{name}: forked ranks do not leave the weights that torchrun's do.")
        found: dict[str, Any] = {"mid_epoch": faults.mid_epoch(), "sweep": faults.sweep(SWEEP_EVERY[stage])}
        if stage == 2:
            found |= {
                "flips": faults.flips(NUM_FLIPS),
                "full_disk": faults.full_disk(),
                "latest_missing": faults.latest_missing(),
                "all_bad": faults.all_bad(),
                "hostile_pickles": faults.hostile_pickles(),
            }
    finally:
        side.stop()
    return found | {"seconds": time.monotonic() - started}


def report(sides: dict[str, Any]) -> dict[str, Any]:
    """All that was measured, as it goes into the JSON."""
    return {
        "what": "crashes, damage and attacks, two gloo ranks, CPU",
        "command": "python bench/crash_peer.py",
        "machine": machine(PACKAGES),
        "seed": SEED,
        "training_arguments": training_arguments(2),
        "overrides": overrides(Path("<setting>"), 2),
        "sides": sides,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=SIDES, help="measure one side, and keep the other's part of the JSON")
    parser.add_argument("--stages", type=int, nargs="+", choices=(2, 3), default=[2, 3], help="ZeRO stages")
    parser.add_argument("--table", action="store_true", help="only write the table from the JSON again")
    parser.add_argument("--output", type=Path, default=RESULTS, help="where the JSON goes, or comes from")
    parser.add_argument("--page", type=Path, default=TABLE, help="where the table goes")
    parser.add_argument(
        "--scratch", type=Path, help="work in this folder and keep it: DeepSpeed's builds are used again"
    )
    options = parser.parse_args()
    found = json.loads(options.output.read_text(encoding="utf-8")) if options.output.exists() else {}
    if not options.table:
        sides: dict[str, Any] = found.get("sides", {}) if options.only else {}
        with tempfile.TemporaryDirectory() as folder:
            scratch = Path(options.scratch or folder).resolve()
            shim, setting = build_shim(scratch), scratch / "setting"
            setting.mkdir(exist_ok=True)
            make_setting(setting)
            for stage in options.stages:
                for name in [options.only] if options.only else SIDES:
                    sides.setdefault(name, {})[f"zero{stage}"] = measure(name, stage, setting, scratch, shim)
                    found = report(sides)
                    options.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    options.page.write_text(crash_table.markdown(found), encoding="utf-8")


if __name__ == "__main__":
    main()
