"""The end of a run: the best weights answer the questions, what was saved is proven, and the report is written."""

from pathlib import Path
from typing import Any

from tunesmith.train.answer import export
from tunesmith.train.answer.generate import answers
from tunesmith.train.answer.scores import answer_metrics, same_answer
from tunesmith.train.checkpoint import conversion
from tunesmith.train.data.render import stop_token_ids
from tunesmith.train.data.template import visible_answer
from tunesmith.train.engine import Engine
from tunesmith.train.errors import TrainingError
from tunesmith.train.files import run_folder
from tunesmith.train.files.disk_errors import remedy
from tunesmith.train.files.fence import fence
from tunesmith.train.ranks import distributed
from tunesmith.train.ranks.phases import Phase
from tunesmith.train.ranks.progress import reach
from tunesmith.train.run import best
from tunesmith.train.run.agreed_stop import AgreedStop
from tunesmith.train.run.setup import Run, Session
from tunesmith.train.run.summary import end_rows, summarise
from tunesmith.train.track.report import write_report
from tunesmith.train.track.track import Sample


def finish(run: Run, session: Session, stop: AgreedStop) -> dict[str, Any]:
    """Every rank calls it. Returns the summary; raises TrainingError when the saved model is not the live one."""
    folder, evaluation = best.bring_back(run, session, stop)
    figures = _answer_questions(run, session, stop)
    run.reporter.phase(Phase.opening_model)
    proof = _prove(run, session.engine, folder)
    reach(Phase.finishing)
    summary = summarise(run, session, evaluation=evaluation | figures, proof=proof)
    run.reporter.finish(summary)
    if run.world.rank == 0:
        fence.check()
        export.discard_drafts(folder)  # only now: until the summary says finished, a restart needs the best weights
        conversion.forget(run.run_dir)  # a run that saved no checkpoint of its own still has it
        if note := write_report(run.run_dir):
            run.reporter.note(note)
        place = run.reporter.wandb_place
        run.reporter.end(end_rows(summary, run.run_dir) + ([("W&B", place)] if place else []), "Finished")
    distributed.barrier()
    return summary


def _answer_questions(run: Run, session: Session, stop: AgreedStop) -> dict[str, float]:
    settings, step = run.config.evaluate, session.state.step
    questions = run.data.questions[: settings.max_records]
    if not settings.generate or not questions:
        return {}

    def answered(done: int, total: int) -> None:
        run.reporter.phase(Phase.generating, words=f"generating answers {done}/{total}")
        stop.end_if_asked()

    run.reporter.phase(Phase.generating, step)
    found = answers(
        session.engine.module,
        questions,
        world=run.world,
        device=run.device,
        batch_size=settings.batch_size,
        max_new_tokens=settings.max_new_tokens,
        stop_ids=stop_token_ids(run.tokenizer),
        pad_token_id=run.tokenizer.pad_token_id,
        progress=answered,
    )
    texts = [visible_answer(run.tokenizer.decode(ids, skip_special_tokens=True)) for ids in found]
    expected = [question.answer for question in questions]
    figures = answer_metrics(texts, expected)
    run.reporter.evaluation(step, figures)
    rows = [
        Sample(question.messages[-1]["content"], question.answer, text, same_answer(text, question.answer))
        for question, text in zip(questions, texts, strict=True)
    ]
    run.reporter.samples(step, rows[: settings.num_samples])
    return figures


def _prove(run: Run, engine: Engine, folder: Path) -> str:
    """Rank 0 opens the written model and compares; every rank hears of a difference."""
    probe_ids, logits_TV = export.probe(engine)
    problem: Exception | None = None
    proof = ""
    if run.world.rank == 0:
        try:
            proof = export.verify(folder, run.config, probe_ids, logits_TV)
            export.publish(folder, run.run_dir / run_folder.MODEL)
        except OSError as error:
            problem = TrainingError(
                f"the model could not be read back and put in its place: {error}.",
                at=str(run.run_dir / run_folder.MODEL),
                do=f"{remedy(str(error), 'mend that')}; the same command goes on from the newest checkpoint.",
            )
            problem.__cause__ = error
        except Exception as error:
            problem = error
    if not distributed.all_ranks(problem is None, run.device):
        raise problem or TrainingError("rank 0 could not prove the saved model.")
    return proof
