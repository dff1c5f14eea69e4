"""The best weights so far, by evaluate.metric: measured, kept in a folder of their own, brought back at the end."""

import math
from pathlib import Path

from tunesmith.train.answer import export
from tunesmith.train.answer.evaluate import evaluate
from tunesmith.train.errors import TrainingError
from tunesmith.train.files.run_folder import best_folder
from tunesmith.train.ranks.phases import Phase
from tunesmith.train.ranks.progress import reach
from tunesmith.train.run.agreed_stop import AgreedStop
from tunesmith.train.run.setup import Run, Session


def measure(run: Run, session: Session, stop: AgreedStop) -> dict[str, float]:
    """The figures of the validation split, which there is. Every rank calls it; raises Stopped when one was asked."""
    assert run.data.validation is not None
    return evaluate(
        session.engine,
        run.objective,
        run.data.validation,
        batch_size=run.config.evaluate.batch_size,
        world=run.world,
        pad_token_id=run.tokenizer.pad_token_id,
        before_batch=stop.end_if_asked,
    )


def keep_if_better(run: Run, session: Session, metrics: dict[str, float]) -> None:
    """Writes the live weights down if they are the best so far; else counts towards evaluate.patience."""
    state, settings = session.state, run.config.evaluate
    sign = 1.0 if run.objective.figures[settings.metric.removeprefix("eval/")] == "min" else -1.0
    value = metrics[settings.metric]
    if not sign * value < (math.inf if state.best_metric is None else sign * state.best_metric):
        state.evaluations_without_better += 1
        return
    state.evaluations_without_better = 0
    try:
        write(run, session)
    except TrainingError as error:  # on all ranks alike
        older = "there are no older best weights" if state.best_step is None else f"step {state.best_step} stays it"
        run.reporter.warn(f"step {state.step}: the best so far, but {error.what} {older}; training goes on")
        return
    state.best_step, state.best_metric = state.step, value


def write(run: Run, session: Session) -> Path:
    """Writes the live weights as the run's best so far. Every rank calls it. Raises TrainingError on all ranks."""
    step = session.state.step
    run.reporter.phase(Phase.writing_model, step)
    folder = best_folder(run.run_dir, step)
    export.write(session.engine, run.tokenizer, run.config, folder)
    if run.world.rank == 0:
        export.remove_others(folder)
    return folder


def bring_back(run: Run, session: Session, stop: AgreedStop) -> tuple[Path, dict[str, float]]:
    """The folder of the best weights and their figures; the live model holds the same weights afterwards."""
    state = session.state
    if state.best_step is None:
        return write(run, session), state.evaluation
    folder = best_folder(run.run_dir, state.best_step)
    if state.best_step == state.step:
        return folder, state.evaluation
    reach(Phase.restoring_best)
    export.restore(session.engine, run.config, folder)
    return folder, measure(run, session, stop)
