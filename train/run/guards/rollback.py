"""Back to the checkpoint before a loss spike, in the same processes, passing over the steps around it.

The steps that are passed over are counted but not trained on, so that the learning rate, the order of the data and the
number of steps stay functions of the step. <run>/rollbacks.json keeps what was decided: a run that is killed before
its next checkpoint, which holds it as well, does not decide anew.
"""

import json
from pathlib import Path
from typing import Any

import torch

from tunesmith.train.checkpoint.checkpoints import Checkpoints
from tunesmith.train.errors import TrainingError
from tunesmith.train.files.durable import write_json
from tunesmith.train.ranks import distributed
from tunesmith.train.ranks.distributed import World
from tunesmith.train.ranks.state import RunState
from tunesmith.train.run.guards.bad_steps import SKIPPED_FILE
from tunesmith.train.run.guards.spikes import NUM_PASSED_OVER, Spike

ROLLBACKS_FILE = "rollbacks.json"


class RollBack(Exception):
    """Raised by the loop on every rank at the same step: the run goes back to the checkpoint of `to_step`."""

    def __init__(self, spiked_step: int, to_step: int) -> None:
        super().__init__(f"back from step {spiked_step} to step {to_step}")
        self.spiked_step = spiked_step
        self.to_step = to_step
        self.passed_over = list(range(spiked_step - NUM_PASSED_OVER + 1, spiked_step + 1))


def decide(
    spike: Spike, state: RunState, checkpoints: Checkpoints, max_rollbacks: int, device: torch.device
) -> RollBack | None:
    """Where to go back to after the spike in the step just done: the newest checkpoint without the steps around it.

    The same on every rank, each of which calls it. None: there is no such checkpoint. Raises TrainingError when the run
    has gone back too often.
    """
    if state.rollbacks >= max_rollbacks:
        raise TrainingError(
            f"the loss leapt again after {max_rollbacks} rollbacks: {spike}.",
            at=f"step {state.step}",
            do=f"lower optimizer.learning_rate, or look at the records that {SKIPPED_FILE} lists; "
            "optimizer.max_rollbacks sets the limit.",
        )
    checkpoints.settle()  # one that is still being written may be the one
    last = state.step - NUM_PASSED_OVER
    found = distributed.broadcast_text(
        str(max((step for step in checkpoints.steps() if step <= last), default="")), device
    )
    return RollBack(state.step, int(found)) if found else None


def write_down(back: RollBack, run_dir: Path, world: World, device: torch.device) -> None:
    """Keeps what was decided, for the session that is then opened from the newest checkpoint, and for later starts.

    Every rank calls it; raises TrainingError on all of them where rank 0 cannot write.
    """
    problem: Exception | None = None
    if world.rank == 0:
        try:
            decided = _parsed(_text(run_dir), run_dir)
            decided.append({"spiked_step": back.spiked_step, "to_step": back.to_step, "passed_over": back.passed_over})
            write_json(run_dir / ROLLBACKS_FILE, decided)
        except (OSError, TrainingError) as error:
            problem = error
    if not distributed.all_ranks(problem is None, device):
        raise TrainingError(
            f"the run cannot be rolled back: {problem or 'rank 0 could not write'}.", at=str(run_dir)
        ) from problem


def add_decided(state: RunState, run_dir: Path, world: World, device: torch.device) -> None:
    """Adds to the state of a checkpoint what rollbacks after it have decided. Every rank calls it."""
    text = distributed.broadcast_text(_text(run_dir) if world.rank == 0 else None, device)
    decided = _parsed(text, run_dir)
    state.passed_over = sorted({step for one in decided for step in one["passed_over"]} | set(state.passed_over))
    state.rollbacks = max(state.rollbacks, len(decided))


def _text(run_dir: Path) -> str:
    try:
        return (run_dir / ROLLBACKS_FILE).read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return "[]"


def _parsed(text: str, run_dir: Path) -> list[dict[str, Any]]:
    """Raises TrainingError, on all ranks, when the file is not such a list."""
    try:
        found = [
            {
                "spiked_step": int(one["spiked_step"]),
                "to_step": int(one["to_step"]),
                "passed_over": [int(step) for step in one["passed_over"]],
            }
            for one in json.loads(text)
        ]
    except (ValueError, TypeError, KeyError) as error:
        raise TrainingError(
            f"{ROLLBACKS_FILE} cannot be read ({type(error).__name__}: {error}).",
            at=str(run_dir / ROLLBACKS_FILE),
            do="remove it: the run then finds loss spikes anew.",
        ) from None
    return found
