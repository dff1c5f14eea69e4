"""Stopping a run together: no rank may leave while another waits for it, so all of them ask, and all hear the same."""

from tunesmith.train.errors import Stopped
from tunesmith.train.ranks import distributed
from tunesmith.train.ranks.phases import Phase
from tunesmith.train.ranks.progress import progress
from tunesmith.train.ranks.stop import ELSEWHERE, STARTED, stop_request
from tunesmith.train.ranks.time_limit import TimeLimit, assumed_save_seconds
from tunesmith.train.run.setup import Run, Session, checkpoint_bytes

STEP_PHASES = (Phase.reading_data, Phase.meeting_at_step, Phase.forward, Phase.backward, Phase.update)


class AgreedStop:
    """Of one run: what this rank says when the ranks ask each other, and the time that rank 0 watches for all."""

    def __init__(self, run: Run, session: Session) -> None:
        self._run = run
        self._state = session.state
        self.limit = TimeLimit(
            run.config.cluster.time_limit_minutes,
            started=STARTED,
            save_seconds=assumed_save_seconds(checkpoint_bytes(session.size, run.config)),
        )

    def begin(self) -> None:
        """From now on a signal is only noted. Every rank calls it; raises ConfigError when the time is over already."""
        if stop_request.is_deferred:  # by the loop before a roll-back
            return
        distributed.barrier()  # a rank that is asked before this ends at once: no other one may have gone on
        stop_request.defer(_plan)
        if not distributed.all_ranks(not self._time_is_over(), self._run.device):
            raise self.limit.too_short()

    def asked(self, *, another_step: bool = False, evaluation_due: bool = False) -> bool:
        """Whether this rank is for stopping now, given what comes before it is asked again."""
        if self._time_is_over(another_step=another_step, evaluation_due=evaluation_due):
            stop_request.ask(f"cluster.time_limit_minutes={self._run.config.cluster.time_limit_minutes:g}")
        return stop_request.reason is not None

    def end_if_asked(self) -> None:
        """Raises Stopped on all ranks when one of them was asked. Every rank calls it."""
        if not distributed.all_ranks(not self.asked(), self._run.device):
            raise self.stopped()

    def stopped(self) -> Stopped:
        return Stopped(stop_request.reason or ELSEWHERE, self._state.step)

    def _time_is_over(self, **ahead: bool) -> bool:
        """Rank 0's clock counts for all."""
        return self._run.world.rank == 0 and self.limit.is_near(**ahead)


def _plan() -> str:
    """What a request is followed by, in words."""
    done, phase = progress.step, progress.phase
    if phase in STEP_PHASES:
        return f"finishing step {done + 1}, then saving"
    return f"{phase} at step {done}; ending once that step is saved"
