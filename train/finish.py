"""The end of a run: the best weights answer the questions, what was saved is proven, and the report is written."""

from pathlib import Path
from typing import Any

from tunesmith.train import distributed, export, run_folder
from tunesmith.train.data.render import stop_token_ids
from tunesmith.train.data.template import visible_answer
from tunesmith.train.errors import TrainingError
from tunesmith.train.evaluate import answer_metrics, same_answer
from tunesmith.train.generate import answers
from tunesmith.train.loop import Loop, best_folder
from tunesmith.train.report import write_report
from tunesmith.train.setup import Run
from tunesmith.train.summary import end_rows, summarise
from tunesmith.train.track import Sample


def finish(loop: Loop) -> dict[str, Any]:
    """Every rank calls it. Returns the summary; raises TrainingError when the saved model is not the live one."""
    run = loop.run
    folder, step = _bring_back_best(loop)
    figures = _answer_questions(run, step)
    run.reporter.phase("opening the saved model again")
    proof = _prove(run, folder)
    summary = summarise(run, train_loss=loop.last_loss, evaluation=loop.last_evaluation | figures, proof=proof)
    run.reporter.finish(summary)
    if run.world.rank == 0:
        write_report(run.run_dir)
        run.reporter.end(end_rows(summary, run.run_dir), "Finished")
    distributed.barrier()
    return summary


def _bring_back_best(loop: Loop) -> tuple[Path, int]:
    """The folder of the best weights and their step; the live model holds the same weights afterwards."""
    run, state = loop.run, loop.run.state
    if state.best_step is None or not best_folder(run.run_dir, state.best_step).is_dir():
        return loop.write_model(), state.step
    folder = best_folder(run.run_dir, state.best_step)
    if state.best_step != state.step:
        export.restore(run.engine, run.config, folder)
    return folder, state.best_step


def _answer_questions(run: Run, step: int) -> dict[str, float]:
    settings = run.config.evaluate
    questions = run.data.questions[: settings.max_records]
    if not settings.generate or not questions:
        return {}
    found = answers(
        run.engine.module,
        questions,
        world=run.world,
        device=run.engine.device,
        batch_size=settings.batch_size,
        max_new_tokens=settings.max_new_tokens,
        stop_ids=stop_token_ids(run.tokenizer),
        pad_token_id=run.tokenizer.pad_token_id,
        progress=lambda done, total: run.reporter.phase(f"generating answers {done}/{total}"),
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


def _prove(run: Run, folder: Path) -> str:
    """Rank 0 opens the written model and compares; every rank hears of a difference."""
    probe_ids, logits_TV = export.probe(run.engine)
    problem: TrainingError | None = None
    proof = ""
    if run.world.rank == 0:
        try:
            proof = export.verify(folder, run.config, probe_ids, logits_TV)
            export.publish(folder, run.run_dir / run_folder.MODEL)
        except TrainingError as error:
            problem = error
    if not distributed.all_ranks(problem is None, run.engine.device):
        raise problem or TrainingError("rank 0 found the saved model to differ from the live one.")
    return proof
