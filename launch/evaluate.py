"""Asks a finished run every question of a file, and compares its answers.

    python launch/evaluate.py run=<run folder> data=<file.jsonl>
    also: batch_size=64 max_new_tokens=256 out=<answers.jsonl>

Prints exact match and ROUGE-L, and as the last line the same as JSON.
"""

import json
import sys
from dataclasses import replace

from tunesmith.launch.arguments import key_values, main, run_dir_of, whole_number
from tunesmith.train.errors import ConfigError
from tunesmith.train.paths import user_path

DEFAULTS = {"run": "", "data": "", "batch_size": "64", "max_new_tokens": "256", "out": ""}


def evaluate(arguments: list[str]) -> None:
    values = key_values(arguments, DEFAULTS, (__doc__ or "").split("\n\n", 1)[1])
    run_dir = run_dir_of(values["run"])
    if not values["data"]:
        raise ConfigError("there are no questions.", at="command line", do="add data=<file.jsonl>.")
    batch_size, max_new_tokens = whole_number(values, "batch_size"), whole_number(values, "max_new_tokens")

    from tunesmith.train.answer.bot import Bot
    from tunesmith.train.answer.scores import answer_metrics, same_answer
    from tunesmith.train.data.prepare import prepare
    from tunesmith.train.objective.objective import make_objective
    from tunesmith.train.track.console import Console

    bot = Bot(run_dir, max_new_tokens=max_new_tokens)
    data = replace(bot.config.data, train=[values["data"]], validation=[], validation_fraction=0.0)
    asked = replace(bot.config, data=data, evaluate=replace(bot.config.evaluate, every_steps=None, patience=None))
    questions = prepare(
        asked, bot.tokenizer, make_objective(asked, bot.tokenizer), show_progress=True
    ).train_questions()
    console = Console()
    answers = bot.answers(questions, batch_size, lambda done, total: console.phase(f"answering {done}/{total}"))
    figures = answer_metrics(answers, [question.answer for question in questions])
    rows = [
        {
            "place": question.place,
            "question": question.messages[-1]["content"],
            "expected": question.answer,
            "answer": answer,
            "exact": same_answer(answer, question.answer),
        }
        for question, answer in zip(questions, answers, strict=True)
    ]
    if values["out"]:
        user_path(values["out"]).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    table = [(name.removeprefix("eval/").replace("_", " "), f"{figure:.4f}") for name, figure in figures.items()]
    console.end([("questions", str(len(questions))), *table], f"{run_dir.name} on {values['data']}")
    console.close()
    result = {name.removeprefix("eval/"): figure for name, figure in figures.items()} | {"questions": len(questions)}
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main(evaluate)
