"""The demo, as `make demo` runs it: train on two ranks, ask every question of both files, show one answer."""

import json
import shlex
import subprocess
import sys
import time
from pathlib import Path

import torch

from tunesmith.launch.arguments import main
from tunesmith.train.config.override_text import override_of
from tunesmith.train.errors import TrainingError

TRAIN_BAR, HELDOUT_BAR = 0.95, 0.80  # exact answers that the demo must reach
EXAMPLE = "conf://data/example"
QUESTION = "hello! my seedlings came cracked, what now?"


def demo(arguments: list[str]) -> None:
    """Further arguments are overrides for the training."""
    started = time.monotonic()
    run_dir = Path("runs", f"demo-{time.strftime('%Y%m%d-%H%M%S')}").absolute()
    launcher = str(Path(sys.executable).with_name("deepspeed"))
    overrides = ["+exp=support_bot", override_of("output_dir", run_dir), *arguments]
    ranks = 1 if torch.cuda.device_count() == 1 else 2  # two on the CPU, and on two GPUs or more
    _call([launcher, "--num_gpus", str(ranks), "launch/train.py", *overrides])
    train = _ask_all(run_dir, "train")
    heldout = _ask_all(run_dir, "heldout")
    sys.stdout.write(f"\nyou> {QUESTION}\n")
    sys.stdout.flush()
    _call([sys.executable, "launch/chat.py", f"run={run_dir}", f"prompt={QUESTION}"])
    seconds = time.monotonic() - started
    sys.stdout.write(f"demo: train_exact_match={train:.4f} heldout_exact_match={heldout:.4f} seconds={seconds:.0f}\n")
    sys.stdout.flush()
    if train < TRAIN_BAR or heldout < HELDOUT_BAR:
        raise TrainingError(f"the bot should reach {TRAIN_BAR} and {HELDOUT_BAR}.", at=str(run_dir))


def _ask_all(run_dir: Path, split: str) -> float:
    """Exact match of the run's answers on one file of the example."""
    output = _call(
        [sys.executable, "launch/evaluate.py", f"run={run_dir}", f"data={EXAMPLE}/{split}.jsonl", "max_new_tokens=96"],
        capture=True,
    )
    return json.loads(output.splitlines()[-1])["exact_match"]


def _call(command: list[str], *, capture: bool = False) -> str:
    """Runs one command of the demo; shows what it prints, or returns it. Raises TrainingError when it fails."""
    shown = shlex.join([Path(command[0]).name, *command[1:]])
    sys.stdout.write(f"\n$ {shown}\n")
    sys.stdout.flush()
    done = subprocess.run(command, stdout=subprocess.PIPE if capture else None, text=True, check=False)
    if capture:
        sys.stdout.write(done.stdout)
    if done.returncode != 0:
        raise TrainingError(f"it ended with exit code {done.returncode}.", at=shown)
    return done.stdout if capture else ""


if __name__ == "__main__":
    main(demo)
