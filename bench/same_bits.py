"""Whether a refactoring left the arithmetic alone: six short runs, and a digest of all that they computed.

    python bench/same_bits.py before.json --checkout <a clone of the commit before>
    python bench/same_bits.py after.json --against before.json

The digest holds every loss and gradient norm as written, each tensor file of each checkpoint, the loop's counters
without their seconds, and the model's weights. Exit code 1, with the names, where two digests differ. On the CPU, in
fp32; about three minutes.
"""

import argparse
import hashlib
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RUNS: dict[str, tuple[int, list[str]]] = {  # ranks, overrides
    "debug": (1, []),
    "lora_zero3": (2, ["adapter=lora", "engine=zero3"]),
    "dora": (1, ["adapter=dora"]),
    "unpacked": (1, ["batch.packing=none", "batch.micro_batch_size=2"]),
    "accumulation": (2, ["batch.global_batch_size=8", "engine=zero1"]),
    "resumed": (2, ["engine=zero2"]),
}
KILLED_AT = "kill:step=4,phase=forward"  # of the run that is resumed, from its checkpoint of step 3
METRICS = ("step", "train/loss", "train/grad_norm", "train/learning_rate", "eval/loss", "eval/token_accuracy")


def train(checkout: Path, scratch: Path, name: str) -> Path:
    """One run of RUNS in a checkout; its folder."""
    num_ranks, overrides = RUNS[name]
    links, run_dir = scratch / "import", scratch / name
    links.mkdir(exist_ok=True)
    if not (links / "tunesmith").exists():
        (links / "tunesmith").symlink_to(checkout / "tunesmith")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {"PYTHONPATH": str(links), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    launcher = [str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", "2", "--master_port", str(port)]
    command = [*(launcher if num_ranks == 2 else [sys.executable]), str(checkout / "launch/train.py"), "+exp=debug"]
    command += [*overrides, f"output_dir={run_dir}", f"data.cache_dir={scratch / 'cache'}"]
    for faults in [KILLED_AT, ""] if name == "resumed" else [""]:
        done = subprocess.run(
            command, env=environment | {"TUNESMITH_FAULTS": faults}, capture_output=True, text=True, check=False
        )
        if (done.returncode == 0) == bool(faults):
            sys.exit(f"{name} ended with {done.returncode}:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
    return run_dir


def digest(run_dir: Path) -> dict[str, Any]:
    """What a run computed, by name."""
    found: dict[str, Any] = {}
    for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        for name in METRICS[1:]:
            if name in row:
                found[f"step {row['step']} {name}"] = row[name]
    for path in sorted([*run_dir.glob("checkpoints/step-*/**/*"), *run_dir.glob("model/*.safetensors")]):
        if path.suffix in (".pt", ".safetensors"):
            found[str(path.relative_to(run_dir))] = hashlib.sha256(path.read_bytes()).hexdigest()
        elif path.name == "state.json":
            state = json.loads(path.read_text(encoding="utf-8"))
            state["best_metric"] = state.pop("best_eval_loss", state.get("best_metric"))  # its name before issue 11
            state.pop("best_name", None)  # which it did not have
            found[str(path.relative_to(run_dir))] = {
                name: value for name, value in sorted(state.items()) if not name.endswith("seconds")
            }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--checkout", type=Path, default=ROOT)
    parser.add_argument("--against", type=Path)
    parser.add_argument("--keep", type=Path, help="leave the run folders in this folder, which must be empty or new")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        scratch = (arguments.keep or Path(temporary)).absolute()
        scratch.mkdir(parents=True, exist_ok=True)
        found = {}
        for name in RUNS:
            found[name] = digest(train(arguments.checkout.absolute(), scratch, name))
            print(f"{name}: {len(found[name])} figures", flush=True)
    arguments.out.write_text(json.dumps(found, indent=1), encoding="utf-8")
    if arguments.against:
        before = json.loads(arguments.against.read_text(encoding="utf-8"))
        keys = [(run, key) for run in RUNS for key in sorted(before[run].keys() | found[run].keys())]
        differ = [f"{run}: {key}" for run, key in keys if before[run].get(key) != found[run].get(key)]
        print(f"same_bits: runs={len(RUNS)} figures={len(keys)} different={len(differ)}", *differ[:20], sep="\n  ")
        sys.exit(1 if differ else 0)


if __name__ == "__main__":
    main()
