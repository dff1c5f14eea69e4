"""Talks to a finished run.

python launch/chat.py run=<run folder>                    a conversation; empty line or Ctrl-D to end
python launch/chat.py run=<run folder> prompt="..."       one answer
also: system="..." max_new_tokens=256 temperature=0 (0: greedy)
"""

import sys
from typing import Any

from tunesmith.launch.arguments import key_values, main, run_dir_of, whole_number
from tunesmith.train.errors import ConfigError
from tunesmith.train.printable import printable

DEFAULTS = {"run": "", "prompt": "", "system": "", "max_new_tokens": "256", "temperature": "0"}


def chat(arguments: list[str]) -> None:
    values = key_values(arguments, DEFAULTS, (__doc__ or "").split("\n\n", 1)[1])
    run_dir = run_dir_of(values["run"])
    max_new_tokens, temperature = whole_number(values, "max_new_tokens"), _temperature(values)
    from tunesmith.train.answer.bot import Bot

    bot = Bot(run_dir, max_new_tokens=max_new_tokens, temperature=temperature)
    history: list[dict[str, Any]] = [{"role": "system", "content": values["system"]}] if values["system"] else []
    if values["prompt"]:
        _answer(bot, history, values["prompt"])
        return
    sys.stdout.write(f"{run_dir.name}: ask away; an empty line ends.\n")
    while question := _ask():
        _answer(bot, history, question)


def _temperature(values: dict[str, str]) -> float:
    try:
        temperature = float(values["temperature"])
    except ValueError:
        temperature = -1.0
    if not 0 <= temperature < float("inf"):
        raise ConfigError(f"temperature={values['temperature']} is not a number of 0 or more.", at="command line")
    return temperature


def _ask() -> str:
    try:
        return input("you> ").strip()
    except EOFError:
        return ""


def _answer(bot: Any, history: list[dict[str, Any]], question: str) -> None:
    history.append({"role": "user", "content": question})
    text = ""
    for piece in bot.stream(history):
        sys.stdout.write(printable(piece))
        sys.stdout.flush()
        text += piece
    sys.stdout.write("\n")
    history.append({"role": "assistant", "content": text})


if __name__ == "__main__":
    main(chat)
