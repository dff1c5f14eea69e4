"""A checkpoint made fit for other ranks or another ZeRO stage, in the background of a start.

    <run>/.tunesmith-universal-step-000100-<digest>/    see zero/shards.py

Rank 0 starts a process for it, the model is loaded meanwhile, and all ranks meet where they need the result. It stays
until a checkpoint of the run's own has been saved, so that a start that fails need not convert again. The name holds a
digest of the checkpoint's manifest: another checkpoint is never taken for it.
"""

import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from tunesmith.train.errors import TrainingError
from tunesmith.train.files import manifest
from tunesmith.train.files.durable import HIDDEN_PREFIX, digest_of
from tunesmith.train.ranks import distributed
from tunesmith.train.ranks.distributed import World
from tunesmith.train.ranks.phases import Phase
from tunesmith.train.ranks.progress import reach
from tunesmith.train.zero import shards

PREFIX = f"{HIDDEN_PREFIX}universal-"
POLL_SECONDS = 2.0  # between two agreements of the ranks: none waits in a collective for as long as a conversion takes
RUNNING, DONE, FAILED = 0.0, 1.0, 2.0


@dataclass
class Conversion:
    """One under way. process is None on every rank but 0."""

    checkpoint: Path
    target: Path
    process: "subprocess.Popen[str] | None"
    _said: str = ""  # on its stderr
    _gave_up: str = ""  # why nobody waits for it any more

    def wait(self, device: torch.device, *, minutes: float) -> Path:
        """The folder of whole parameters, on every rank. Raises TrainingError on all of them when there is none.

        minutes: of waiting, after which the process counts as hanging. The ranks are not: they ask it all the time.
        """
        state, deadline = RUNNING, time.monotonic() + 60 * minutes
        while state == RUNNING:
            reach(Phase.converting)
            state = distributed.max_over_ranks(self._state(), device)
            if state == RUNNING and distributed.max_over_ranks(time.monotonic() > deadline, device):
                state = self._give_up(f"it was not done in {minutes:g} minutes (cluster.start_timeout_minutes)")
        problem = distributed.broadcast_text(self._problem() if state == FAILED else None, device)
        if not problem and not distributed.all_ranks(self.target.is_dir(), device):
            problem = "not every rank sees the folder that rank 0 has converted it to"
        if problem:
            raise TrainingError(
                f"the checkpoint could not be converted for these ranks and this engine: {problem}.",
                at=str(self.checkpoint),
                do="mend that, or resume with the ranks and the engine it was saved with.",
            )
        return self.target

    def _state(self) -> float:
        if self.process is None:
            return RUNNING  # whatever rank 0 says is more
        try:
            _, self._said = self.process.communicate(timeout=POLL_SECONDS)
        except subprocess.TimeoutExpired:
            return RUNNING
        return DONE if self.process.returncode == 0 else FAILED

    def _give_up(self, reason: str) -> float:
        self._gave_up = reason
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
        return FAILED

    def _problem(self) -> str:
        if self.process is None or self._gave_up:
            return self._gave_up
        if self.process.returncode < 0:
            return f"the process that did it was ended by {signal.Signals(-self.process.returncode).name}"
        lines = self._said.strip().splitlines()
        return lines[-1].rstrip(".") if lines else f"the process that did it ended with {self.process.returncode}"


def start(checkpoint: Path, engine_folder: Path, run_dir: Path, world: World) -> Conversion:
    """Begins to convert a checkpoint's engine files into a folder in run_dir, or to check the one that is there.

    The checkpoint's own files must have been checked. Every rank calls it; only rank 0 does something.
    """
    target = run_dir / f"{PREFIX}{checkpoint.name}-{digest_of(checkpoint / manifest.NAME).sha256[:16]}"
    if world.rank != 0:
        return Conversion(checkpoint, target, None)
    forget(run_dir, keep=target)
    command = [sys.executable, "-P", "-m", shards.__name__, str(engine_folder), str(target)]
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    return Conversion(checkpoint, target, process)


def forget(run_dir: Path, *, keep: Path | None = None) -> None:
    """Removes conversions, and what an interrupted one left behind; not what another process works on. Rank 0 only."""
    for folder in run_dir.glob(f"{PREFIX}*"):
        if folder != keep and not shards.is_at_work(folder):
            shutil.rmtree(folder, ignore_errors=True)
