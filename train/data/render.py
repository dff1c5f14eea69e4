"""Records -> token ids and the weight of each token in the loss.

A conversation is rendered by the tokenizer's chat template and tokenised as one text. What is learned is decided from
the offsets of the tokens: an assistant turn from where its generation prompt ends to the end of its end-of-turn token.
"""

import logging
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from tunesmith.train.config.config import Targets
from tunesmith.train.data.encode import Encoder, Tokens
from tunesmith.train.data.messages import Message
from tunesmith.train.data.records import Record
from tunesmith.train.data.template import ChatTemplate, Job, Messages, Tools, opened_thought, shared_prefix
from tunesmith.train.errors import DataError, ModelError

logger = logging.getLogger(__name__)
Span = tuple[int, int, float]  # first character, character after the last, weight


@dataclass(frozen=True)
class Rendered:
    """One training sequence."""

    place: str  # of its record
    text: str  # what was tokenised
    spans: list[Span]  # the targets in the text
    input_ids: np.ndarray  # [T], int32
    weights: np.ndarray  # [T], float32; of each token in the loss, 0: not learned
    is_straddled: bool = False  # tokenised as a whole, other ids would have come before an answer than a server sends


@dataclass(frozen=True)
class _Turn:
    """One assistant turn rendered as the last of its conversation."""

    text: str  # up to and with the end-of-turn token
    start: int  # first character that is learned
    weight: float
    is_altered: (
        bool  # not as the template renders it: it closes an opened thought, or ends in an eos token that it lacks
    )

    @property
    def span(self) -> Span:
        return self.start, len(self.text), self.weight


@dataclass(frozen=True)
class _Sequence:
    """A text to train on and its targets."""

    record: Record
    text: str
    spans: list[Span]


def render(tokenizer: PreTrainedTokenizerBase, record: Record, targets: Targets) -> list[Rendered]:
    """One record as training sequences: one, or one for each target turn when the template rewrites earlier turns.

    Raises: DataError naming the record when the template refuses it or a message contains a control token;
        ModelError when the template ends no turn and there is no eos token.
    """
    return Renderer(tokenizer).render([record], targets)[0]


def encode_prompt(tokenizer: PreTrainedTokenizerBase, messages: Messages, tools: Tools | None = None) -> list[int]:
    """Token ids of a conversation up to the answer that is to be generated: the ids that training had before it."""
    return Renderer(tokenizer).encode_prompts([Job(messages, tools, True, "the conversation")])[0]


def stop_token_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids that end an answer: the end-of-turn token that the template makes the model learn, and eos."""
    return ChatTemplate(tokenizer).stop_token_ids()


def target_turns(record: Record, targets: Targets) -> list[int]:
    """Indices of the messages that are learned. Raises DataError when there is none."""
    turns = [index for index, message in enumerate(record.messages) if message.role == "assistant"]
    if targets is Targets.last_turn:
        turns = turns[-1:]
    learned = [index for index in turns if record.messages[index].weight > 0]
    if not learned:
        raise DataError(
            f"{record.place}: the last assistant message has weight 0, so objective.targets=last_turn learns nothing.",
            do="give it a weight above 0, or set objective.targets=all_turns.",
        )
    return learned


class Renderer:
    """Renders many records with one tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.template = ChatTemplate(tokenizer)
        self.encoder = Encoder(tokenizer)
        self.warned = False

    def render(self, records: Sequence[Record], targets: Targets) -> list[list[Rendered]]:
        """The training sequences of each record, tokenised in one batch."""
        turns = self._turns(records, targets)
        sequences = [_together(record, found) for record, found in zip(records, turns, strict=True)]
        tokens = self._encode([sequence for found in sequences for sequence in found])
        again: list[tuple[int, list[_Sequence]]] = []
        rendered: list[list[Rendered]] = []
        for index, found in enumerate(sequences):
            own = [next(tokens) for _ in found]
            rendered.append([self._rendered(sequence, one) for sequence, one in zip(found, own, strict=True)])
            # A cut before an earlier turn would stay in the history of the later ones, where no server makes it.
            if any(cut < sequence.spans[-1][0] for sequence, one in zip(found, own, strict=True) for cut in one.cuts):
                again.append((index, _apart(records[index], turns[index])))
        tokens = self._encode([sequence for _, found in again for sequence in found])
        for index, found in again:
            rendered[index] = [self._rendered(sequence, next(tokens)) for sequence in found]
        return rendered

    def encode_prompts(self, prompts: list[Job]) -> list[list[int]]:
        """`encode_prompt` of many, as one batch."""
        texts = self.template.render(prompts)
        boundaries = self.template.boundaries(prompts, texts)
        texts = [text[:boundary] for text, boundary in zip(texts, boundaries, strict=True)]
        return [self._bos_ids(text) + one.ids for text, one in zip(texts, self.encoder.encode(texts), strict=True)]

    def _turns(self, records: Sequence[Record], targets: Targets) -> list[list[_Turn]]:
        """The target turns of each record, each rendered as the last of its conversation."""
        jobs: list[Job] = []
        indices: list[list[int]] = []
        for record in records:
            messages = [message.as_dict() for message in record.messages]
            self._check(record, messages)
            found = target_turns(record, targets)
            indices.append(found)
            for index in found:
                jobs.append(Job(messages[:index], record.tools, True, record.place))
                jobs.append(Job(messages[: index + 1], record.tools, False, record.place))
        texts = iter(self.template.render(jobs))
        turns = [
            [self._turn(record, index, next(texts), next(texts)) for index in found]
            for record, found in zip(records, indices, strict=True)
        ]
        for record, found, made in zip(records, indices, turns, strict=True):
            for index, turn in zip(found, made, strict=True):
                _check_calls(record.messages[index], turn.text[turn.start :], record.place)
        return turns

    def _check(self, record: Record, messages: Messages) -> None:
        if self.template.is_raw and record.form != "completion":
            raise DataError(
                f"{record.place}: data.chat_template=raw takes prompt and completion, not messages.",
                do="set data.chat_template=auto, or give prompt and completion rows.",
            )
        self.template.check_text(Job(messages, record.tools, False, record.place))

    def _turn(self, record: Record, index: int, prompt: str, rendered: str) -> _Turn:
        message = record.messages[index]
        text, unchanged = self.template.turn_end(rendered)
        is_altered = unchanged < len(text)
        if text.startswith(prompt):
            return _Turn(text, len(prompt), message.weight, is_altered)
        thought = opened_thought(prompt)
        if thought and text.startswith(prompt[: thought.start()]):
            answer = text[thought.start() :].removeprefix(thought.group().rstrip())
            closed = prompt + _closed_thought(message, thought.group(1), answer)
            return _Turn(closed, len(prompt), message.weight, True)
        before = [message.as_dict() for message in record.messages[:index]]
        (boundary,) = self.template.boundaries([Job(before, record.tools, True, record.place)], [prompt])
        start = min(boundary, shared_prefix(prompt, text))
        if not self.warned:
            self.warned = True
            logger.warning(
                "The chat template asks for an answer with %r but writes %r before one; answers are learned, and asked "
                "for, from where the two part.",
                prompt[start:],
                text[start : start + 20],
            )
        return _Turn(text, start, message.weight, is_altered)

    def _encode(self, sequences: list[_Sequence]) -> Iterator[Tokens]:
        boundaries = [[start for start, _, _ in sequence.spans] for sequence in sequences]
        return iter(self.encoder.encode_answers([sequence.text for sequence in sequences], boundaries))

    def _rendered(self, sequence: _Sequence, tokens: Tokens) -> Rendered:
        bos_ids = self._bos_ids(sequence.text)
        weights = np.zeros(len(bos_ids) + len(tokens.ids), dtype=np.float32)
        for start, end, weight in sequence.spans:
            first, last = bisect_right(tokens.ends, start), bisect_left(tokens.ends, end)
            self._check_end(tokens.ids[last], sequence.text[:end], sequence.record.place)
            weights[len(bos_ids) + first : len(bos_ids) + last + 1] = weight
        return Rendered(
            place=sequence.record.place,
            text=sequence.text,
            spans=sequence.spans,
            input_ids=np.array(bos_ids + tokens.ids, dtype=np.int32),
            weights=weights,
            is_straddled=bool(tokens.cuts or tokens.crossed),
        )

    def _check_end(self, token_id: int, text: str, place: str) -> None:
        token = self.tokenizer.convert_ids_to_tokens(token_id)
        if not text.endswith(token):
            raise ModelError(
                f"the turn that ends in {text[-20:]!r} is not ended by one token of its own but by {token!r}.",
                at=place,
                do="give a chat template (data.chat_template) that ends assistant turns with a special token.",
            )

    def _bos_ids(self, text: str) -> list[int]:
        """The bos token, where the tokenizer wants one and the template has not written it."""
        if not self.template.adds_bos or text.startswith(self.tokenizer.bos_token):
            return []
        return [self.tokenizer.bos_token_id]


def _check_calls(message: Message, learned: str, place: str) -> None:
    """Raises DataError when a template leaves out the tool calls of a turn: an empty answer would be learned."""
    for call in message.extra.get("tool_calls") or ():
        name = call.get("function", call).get("name")
        if isinstance(name, str) and name not in learned:
            raise DataError(
                f"{place}: the chat template leaves out the call of the tool {name!r}.",
                do="set data.chat_template to a .jinja file that writes tool calls, or leave such rows out.",
            )


def _together(record: Record, turns: list[_Turn]) -> list[_Sequence]:
    """One text with every turn as a target; or one a turn, when later turns change how earlier ones are rendered."""
    whole = turns[-1].text
    if len(turns) > 1 and any(turn.is_altered or not whole.startswith(turn.text) for turn in turns):
        return _apart(record, turns)
    return [_Sequence(record, whole, [turn.span for turn in turns])]


def _apart(record: Record, turns: list[_Turn]) -> list[_Sequence]:
    """Each turn as a text of its own, with what came before it."""
    return [_Sequence(record, turn.text, [turn.span]) for turn in turns]


def _closed_thought(message: Message, tag: str, answer: str) -> str:
    """What follows an opened thought: the message's own thought if it has one, the closing tag, the answer."""
    closing = f"</{tag}>"
    if closing in answer:  # the template kept the thought
        return answer.lstrip("\n")
    thought = message.extra.get("reasoning_content") or message.extra.get("thinking") or ""
    if closing in (message.content or ""):
        thought = (message.content or "").rpartition(closing)[0].rpartition(f"<{tag}>")[2]
    return f"{thought.strip()}\n{closing}\n\n" + answer.lstrip("\n")
