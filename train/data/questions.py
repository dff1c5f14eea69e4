"""The last answer of each record, as a question to ask the tuned model."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
from transformers import PreTrainedTokenizerBase

from tunesmith.train.data.records import Record
from tunesmith.train.data.render import Renderer
from tunesmith.train.data.template import Job, Messages, Tools, visible_answer


@dataclass(frozen=True)
class Question:
    """What a user would send, and what the model should say."""

    messages: Messages  # up to and without the answer
    answer: str  # without the thought before it, if there is one
    prompt_ids: list[int]  # the ids that training had before the answer
    place: str  # file.jsonl:12
    tools: Tools | None = None


def write_question(record: Record, index: int, num_prompt_tokens: int | None) -> bytes | None:
    """The line that `read_questions` reads; None when the answer has no text (a tool call).

    Args:
        index: of the answer among the record's messages.
        num_prompt_tokens: tokens before the answer where truncation has left some out; None: all.
    """
    answer = record.messages[index].content
    if answer is None:
        return None
    row: dict[str, Any] = {
        "messages": [message.as_dict() for message in record.messages[:index]],
        "answer": visible_answer(answer),
        "place": record.place,
        "tools": record.tools,
        "num_prompt_tokens": num_prompt_tokens,
    }
    return orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE)


def read_questions(path: Path, tokenizer: PreTrainedTokenizerBase) -> list[Question]:
    """The questions of a file, with their prompts as token ids."""
    rows = [orjson.loads(line) for line in path.read_bytes().splitlines()]
    prompts = Renderer(tokenizer).encode_prompts(
        [Job(row["messages"], row["tools"], True, row["place"]) for row in rows]
    )
    return [
        Question(
            messages=row["messages"],
            answer=row["answer"],
            prompt_ids=_shortened(ids, row["num_prompt_tokens"], tokenizer.bos_token_id),
            place=row["place"],
            tools=row["tools"],
        )
        for row, ids in zip(rows, prompts, strict=True)
    ]


def prompts_in(path: Path) -> Iterable[bytes]:
    """The messages of each question as JSON, to find equal ones."""
    return (orjson.dumps(orjson.loads(line)["messages"]) for line in path.read_bytes().splitlines())


def _shortened(ids: list[int], num_tokens: int | None, bos_token_id: int | None) -> list[int]:
    if num_tokens is None or len(ids) <= num_tokens:
        return ids
    num_bos = int(ids[0] == bos_token_id)
    return ids[:num_bos] + ids[len(ids) - (num_tokens - num_bos) :]
