"""Write the example data set: what people ask about Mossbert, and what Puddle & Fern answers.

python conf/data/example/build.py           writes the four JSONL files beside this script
python conf/data/example/build.py --check   exits 1 when they are stale

Every wording stands under topics/. A training wording becomes several rows: first as it is, then with an opening, a
closing, sloppy casing or a typo. A held-out wording becomes one row, as it is.
"""

import argparse
import json
import random
import re
import sys
import tomllib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

HERE = Path(__file__).parent
SEED = 20250
ROWS_PER_INTENT = 34
CHAT_ROWS_PER_INTENT = 12
KEEPS_ITS_CAPITAL = {"I", "I'm", "I'd", "I've", "Mossbert", "Seed", "Bluetooth"}

Row = dict[str, Any]
T = TypeVar("T")


@dataclass(frozen=True)
class Intent:
    name: str
    answer: str
    train: tuple[str, ...]
    heldout: tuple[str, ...]


@dataclass(frozen=True)
class Phrases:
    openings: tuple[str, ...]
    closings: tuple[str, ...]
    second_turns: tuple[str, ...]
    system: str
    chat_intents: tuple[str, ...]


class Dice:
    """Choices drawn from Random.random alone, the one method Python promises to keep the same between versions."""

    def __init__(self, *seed: object) -> None:
        self._random = random.Random("/".join(map(str, seed)))

    def index(self, size: int) -> int:
        return int(self._random.random() * size)

    def pick(self, options: Sequence[T]) -> T:
        return options[self.index(len(options))]

    def shuffled(self, items: Sequence[T]) -> list[T]:
        return [item for _, item in sorted(((self._random.random(), item) for item in items), key=lambda pair: pair[0])]


def load_intents() -> list[Intent]:
    topics = [tomllib.loads(path.read_text("utf-8")) for path in sorted((HERE / "topics").glob("*.toml"))]
    return [
        Intent(name, entry["answer"], tuple(entry["train"]), tuple(entry["heldout"]))
        for topic in topics
        for name, entry in topic.items()
    ]


def load_phrases() -> Phrases:
    entry: dict[str, Any] = tomllib.loads((HERE / "phrases.toml").read_text("utf-8"))
    system = entry.pop("system")
    return Phrases(system=system, **{key: tuple(values) for key, values in entry.items()})


def after(opening: str, wording: str) -> str:
    """The wording behind an opening; it loses its capital unless the opening ended a sentence."""
    if opening.endswith((", ", ": ")) and wording.split()[0] not in KEEPS_ITS_CAPITAL:
        wording = wording[0].lower() + wording[1:]
    return opening + wording


def ended(wording: str) -> str:
    """A bare search phrase ("refill tank") gets a full stop before anything follows it."""
    return wording if wording.endswith((".", "?", "!")) else wording + "."


def misspell(wording: str, dice: Dice) -> str:
    """Swap two inner letters of one word of four or more, or leave one out; "How can I pay?" has none and stays."""
    words = list(re.finditer(r"[A-Za-z]{4,}", wording))
    if not words:
        return wording
    word = dice.pick(words)
    at = word.start() + 1 + dice.index(len(word[0]) - 3)
    if dice.index(2):
        return wording[:at] + wording[at + 1 :]
    return wording[:at] + wording[at + 1] + wording[at] + wording[at + 2 :]


def varied(wording: str, phrases: Phrases, dice: Dice) -> str:
    """The wording as another person might send it."""
    opening, closing = dice.pick(phrases.openings), dice.pick(phrases.closings)
    forms: tuple[Callable[[], str], ...] = (
        lambda: after(opening, wording),
        lambda: ended(wording) + closing,
        lambda: after(opening, ended(wording)) + closing,
        lambda: wording.rstrip(".?!").lower(),
        lambda: wording.replace("'", "").lower(),
        lambda: misspell(wording, dice),
        lambda: after(opening, misspell(wording, dice)),
    )
    return dice.pick(forms)()


def prompts(intent: Intent, phrases: Phrases) -> list[str]:
    """ROWS_PER_INTENT different prompts: each wording as it stands, then variations of each in turn."""
    dice = Dice(SEED, "prompts", intent.name)
    found = dict.fromkeys(intent.train)
    while True:
        for wording in dice.shuffled(intent.train):
            if len(found) >= ROWS_PER_INTENT:
                return list(found)
            found[varied(wording, phrases, dice)] = None


def chat(system: str, *turns: str) -> Row:
    roles = ["system", *(("user", "assistant")[i % 2] for i in range(len(turns)))]
    return {"messages": [{"role": r, "content": text} for r, text in zip(roles, (system, *turns), strict=True)]}


def chat_rows(split: str, intents: list[Intent], phrases: Phrases) -> Iterator[Row]:
    """Conversations about phrases.chat_intents; the last of every three goes on to a second question."""
    chosen = [intent for intent in intents if intent.name in phrases.chat_intents]
    wordings = {i.name: i.heldout if split == "heldout" else i.train[:CHAT_ROWS_PER_INTENT] for i in chosen}
    dice = Dice(SEED, "chat", split)
    for intent in chosen:
        others = [other for other in chosen if other is not intent]
        for i, wording in enumerate(wordings[intent.name]):
            if i % 3 < 2:
                yield chat(phrases.system, wording, intent.answer)
                continue
            other = dice.pick(others)
            second = dice.pick(phrases.second_turns) + dice.pick(wordings[other.name])
            yield chat(phrases.system, wording, intent.answer, second, other.answer)


def build() -> dict[str, str]:
    """File name -> its whole text."""
    intents, phrases = load_intents(), load_phrases()
    files: dict[str, list[Row]] = {
        "train.jsonl": [{"prompt": p, "completion": i.answer} for i in intents for p in prompts(i, phrases)],
        "heldout.jsonl": [{"prompt": p, "completion": i.answer} for i in intents for p in i.heldout],
        "chat_train.jsonl": list(chat_rows("train", intents, phrases)),
        "chat_heldout.jsonl": list(chat_rows("heldout", intents, phrases)),
    }
    return {
        name: "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in Dice(SEED, name).shuffled(rows))
        for name, rows in files.items()
    }


def main() -> int:
    parser = argparse.ArgumentParser(description="Write the example data set, or check that it is up to date.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when a file is stale")
    check = parser.parse_args().check
    stale = []
    for name, text in build().items():
        path = HERE / name
        if path.exists() and path.read_bytes() == text.encode():
            continue
        stale.append(name)
        if not check:
            path.write_bytes(text.encode())
    if check and stale:
        print(f"stale in {HERE}: {', '.join(stale)}.\n  do: python conf/data/example/build.py", file=sys.stderr)
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
