"""What watches over the steps: bad ones, loss spikes, slow ranks, and weights that change by themselves."""

from tunesmith.train.config.config import OnSpike
from tunesmith.train.errors import TrainingError
from tunesmith.train.ranks.state import Step
from tunesmith.train.run.guards import rollback
from tunesmith.train.run.guards.bad_steps import SKIPPED_FILE, BadSteps
from tunesmith.train.run.guards.replicas import Replicas
from tunesmith.train.run.guards.spikes import Spike, find_spike, remember
from tunesmith.train.run.guards.stragglers import BusyClock, Stragglers, host_names
from tunesmith.train.run.setup import Run, Session


class Guards:
    """Every rank makes one at the same time, with the session as it stands before its next step."""

    def __init__(self, run: Run, session: Session) -> None:
        self._run = run
        self._session = session
        hosts = host_names(run.device)
        self.busy = BusyClock(run.device, forward_waits=run.config.engine.stage == 3)
        self._stragglers = Stragglers(hosts)
        self._replicas = self._make_replicas(hosts)
        self.bad_steps = BadSteps(run.run_dir, run.feed, run.device, run.world.rank == 0, run.reporter.warn)
        self.bad_steps.begin(session.state.step)

    def before_update(self) -> None:
        """Gradients are ready and the weights still are those of the forward. Raises TrainingError on all ranks."""
        every, number = self._run.config.cluster.check_replicas_every, self._session.state.step + 1
        if self._replicas is not None and every and number % every == 0:
            self._replicas.check(number)

    def after_step(self, step: Step, seconds: float) -> None:
        """A step is done and counted. Raises TrainingError or RollBack, on all ranks alike."""
        state = self._session.state
        for slow in self._stragglers.add(step.consensus.busy_seconds, seconds):
            self._run.reporter.warn(f"step {state.step}: {slow}")
        if not step.applied:
            self._check_skips(step)
        spike = find_spike(step.loss, state.losses, self._run.config.optimizer.spike_sigma)
        remember(state.losses, step.loss)
        if spike:
            self._meet(spike)

    def _check_skips(self, step: Step) -> None:
        state, limit = self._session.state, self._run.config.optimizer.max_skipped_steps
        self.bad_steps.not_applied(state.step, step, state.skipped_in_row)
        if state.skipped_in_row >= limit:
            raise TrainingError(
                f"{limit} steps in a row had a loss or gradient that is not finite.",
                at=f"step {state.step}",
                do="lower optimizer.learning_rate, use engine.precision=bf16 instead of fp16, or look at the data of "
                f"these steps, which {self.bad_steps.path} lists; optimizer.max_skipped_steps sets the limit.",
            )

    def _meet(self, spike: Spike) -> None:
        """Does what optimizer.on_spike says. Every rank has the same loss, and so comes here at the same step."""
        state, settings, warn = self._session.state, self._run.config.optimizer, self._run.reporter.warn
        if settings.on_spike is OnSpike.warn:
            warn(f"step {state.step}: {spike} (optimizer.on_spike=warn)")
            return
        if settings.on_spike is OnSpike.stop:
            raise TrainingError(
                f"the loss leapt: {spike}.",
                at=f"step {state.step}, optimizer.on_spike=stop",
                do="lower optimizer.learning_rate, or let optimizer.on_spike=rollback pass over such steps.",
            )
        back = rollback.decide(spike, state, self._session.checkpoints, settings.max_rollbacks, self._run.device)
        if back is None:
            warn(f"step {state.step}: {spike}; there is no checkpoint before it to go back to, so training goes on")
            return
        warn(
            f"step {state.step}: {spike}; back to the checkpoint of step {back.to_step}, passing over steps "
            f"{back.passed_over[0]} to {back.passed_over[-1]}, whose records are in {SKIPPED_FILE} "
            f"({state.rollbacks + 1} of at most {settings.max_rollbacks})"
        )
        raise back

    def _make_replicas(self, hosts: list[str]) -> Replicas | None:
        if not self._run.config.cluster.check_replicas_every:
            return None
        replicas = Replicas(self._session.engine, hosts)
        if replicas.num_compared < replicas.num_tensors:
            compared = replicas.num_compared or "none"
            self._run.reporter.note(
                f"cluster.check_replicas_every: {compared} of {replicas.num_tensors} weights can be checked; the "
                "others are split over the ranks, and nothing else holds them"
            )
        return replicas if replicas.num_compared else None
