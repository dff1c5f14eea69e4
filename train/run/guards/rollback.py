"""Back to the checkpoint before a loss spike, in the same processes, passing over the steps around it.

The steps that are passed over are counted but not trained on, so that the learning rate, the order of the data and the
number of steps stay functions of the step. <run>/rollbacks.json keeps what was decided: a run that is killed before
its next checkpoint, which holds it as well, does not decide anew.
"""

import gc
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tunesmith.train.errors import TrainingError
from tunesmith.train.files.run_folder import write_json
from tunesmith.train.ranks import distributed
from tunesmith.train.ranks.distributed import World
from tunesmith.train.ranks.progress import reach
from tunesmith.train.ranks.state import RunState
from tunesmith.train.run.guards.bad_steps import SKIPPED_FILE
from tunesmith.train.run.guards.spikes import NUM_PASSED_OVER, Spike

if TYPE_CHECKING:
    from tunesmith.train.run.setup import Run

ROLLBACKS_FILE = "rollbacks.json"


class RollBack(Exception):
    """Raised by the loop on every rank at the same step: the run goes back to the checkpoint of `to_step`."""

    def __init__(self, spiked_step: int, to_step: int) -> None:
        super().__init__(f"back from step {spiked_step} to step {to_step}")
        self.spiked_step = spiked_step
        self.to_step = to_step
        self.passed_over = list(range(spiked_step - NUM_PASSED_OVER + 1, spiked_step + 1))


def decide(run: "Run", spike: Spike) -> RollBack | None:
    """Where to go back to after the spike in the step just done: the newest checkpoint without the steps around it.

    The same on every rank, each of which calls it. None: there is no such checkpoint. Raises TrainingError when the run
    has gone back too often.
    """
    state, limit = run.state, run.config.optimizer.max_rollbacks
    if state.rollbacks >= limit:
        raise TrainingError(
            f"the loss leapt again after {limit} rollbacks: {spike}.",
            at=f"step {state.step}",
            do=f"lower optimizer.learning_rate, or look at the records that {SKIPPED_FILE} lists; "
            "optimizer.max_rollbacks sets the limit.",
        )
    run.checkpoints.settle()  # one that is still being written may be the one
    last = state.step - NUM_PASSED_OVER
    steps = [step for step in run.checkpoints.steps() if step <= last] if run.world.rank == 0 else []
    found = distributed.broadcast_text(str(max(steps, default="")), run.engine.device)
    return RollBack(state.step, int(found)) if found else None


def take_down(run: "Run", back: RollBack) -> None:
    """Frees the engine (ZeRO 3 cannot load into a used one) and leaves nothing of the steps after the checkpoint.

    Every rank calls it; the run that is then set up from the newest checkpoint takes up what this one has decided.
    """
    reach("taking up an earlier checkpoint")
    run.checkpoints.forget_after(back.to_step)  # or the next start would take the newest, whose loss spikes again
    problem: Exception | None = None
    if run.world.rank == 0:
        try:
            decided = _parsed(_text(run.run_dir), run.run_dir)
            decided.append({"spiked_step": back.spiked_step, "to_step": back.to_step, "passed_over": back.passed_over})
            write_json(run.run_dir / ROLLBACKS_FILE, decided)
        except (OSError, TrainingError) as error:
            problem = error
    if not distributed.all_ranks(problem is None, run.engine.device):
        raise TrainingError(
            f"the run cannot be rolled back: {problem or 'rank 0 could not write'}.", at=str(run.run_dir)
        ) from problem
    run.engine.close()
    del run.engine  # whoever still holds the run holds no weights
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def take_up(state: RunState, run_dir: Path, world: World, device: torch.device) -> None:
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
    """Raises TrainingError, on all ranks, when the file is not one of ours."""
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
