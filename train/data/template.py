"""What a tokenizer's chat template writes around messages, learned by rendering probes and never by its source."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

from tunesmith.train.data.tokenizer import RAW_TEMPLATE, adds_bos
from tunesmith.train.data.tool_calls import to_object, to_text, with_arguments
from tunesmith.train.errors import DataError, ModelError

Messages = list[dict[str, Any]]
Tools = list[dict[str, Any]]
QUESTION = {"role": "user", "content": "a"}
ANSWERS = ("b", "3")  # no character in common, so whatever two renderings share was written by the template
ARGUMENTS = {"left": "right"}  # of a probe
AS_JSON = re.compile(r'"left":\s*"right"')
SCHEMA = {"type": "object", "properties": {"left": {"type": "string", "description": "d"}}, "required": ["left"]}
PROBE_TOOLS = [{"type": "function", "function": {"name": "f", "description": "d", "parameters": SCHEMA}}]
OPENED_THOUGHT = re.compile(r"<(think|thinking|thought|reasoning)>(\s*)\Z")
# Role markers that a template may write as plain text, which no list of special tokens knows.
MARKER = re.compile(r"<[|｜][^\s<>{}'\"+]{1,40}[|｜]>|\[/?[A-Z_]{2,}\]|</?(?:start|end)_of_\w+>")


@dataclass(frozen=True)
class Job:
    """One rendering to do."""

    messages: Messages
    tools: Tools | None
    add_generation_prompt: bool
    place: str = ""


class ChatTemplate:
    """A tokenizer's chat template. Make it anew when the tokenizer's template or tokens change."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.is_raw = tokenizer.chat_template == RAW_TEMPLATE

    def render(self, jobs: list[Job]) -> list[str]:
        """The text of each job. Raises DataError naming the record when the template refuses a conversation."""
        texts = [""] * len(jobs)
        for flag in (False, True):
            plain = [i for i, job in enumerate(jobs) if job.tools is None and job.add_generation_prompt is flag]
            if plain:
                try:
                    rendered = self._apply([jobs[i].messages for i in plain], None, flag)
                except Exception:  # a template is a program of another's: it raises what it likes
                    rendered = [self._render_one(jobs[i]) for i in plain]  # finds the one that is refused
                for i, text in zip(plain, rendered, strict=True):
                    texts[i] = text
        for i, job in enumerate(jobs):
            if job.tools is not None:
                texts[i] = self._render_one(job)
        return texts

    def _render_one(self, job: Job) -> str:
        try:
            return self._apply([job.messages], job.tools, job.add_generation_prompt)[0]
        except Exception as error:
            roles = ", ".join(message["role"] for message in job.messages) or "no message before the first answer"
            kind = "" if isinstance(error, jinja2.TemplateError) else f"{type(error).__name__}: "
            raise DataError(
                f"{job.place}: the chat template refuses this conversation ({roles}): {kind}{error}",
                do="change the row, or set data.chat_template to a .jinja file that takes it.",
            ) from error

    def _apply(self, conversations: list[Messages], tools: Tools | None, add_generation_prompt: bool) -> list[str]:
        taken = [[with_arguments(message, self._arguments) for message in messages] for messages in conversations]
        return self._written(taken, tools, add_generation_prompt)

    def _written(self, conversations: list[Messages], tools: Tools | None, add_generation_prompt: bool) -> list[str]:
        return self.tokenizer.apply_chat_template(
            conversations, tools=tools, tokenize=False, add_generation_prompt=add_generation_prompt
        )

    def _arguments(self, given: Any) -> Any:
        """The arguments of a tool call, in either form, in the one that the template takes."""
        try:
            arguments = to_object(given)
        except ValueError:  # in a conversation with a user; in a record it is an error
            return given
        return to_text(arguments) if self.takes_text else arguments

    @cached_property
    def takes_text(self) -> bool:
        """Whether the template needs the arguments of a tool call as JSON text, which it writes as it is.

        Others write the JSON themselves, and would encode text again, or write no JSON at all.
        """
        for content in ("", None):
            for tools in (None, PROBE_TOOLS):
                as_object, as_text = (
                    self._call_probe(form, content, tools) for form in (ARGUMENTS, to_text(ARGUMENTS))
                )
                if "right" in as_object and str(ARGUMENTS) not in as_object:  # nor written as Python would
                    return False
                if AS_JSON.search(as_text):
                    return True
        return False

    def _call_probe(self, arguments: Any, content: str | None, tools: Tools | None) -> str:
        call = {"id": "abcdefgh1", "type": "function", "function": {"name": "f", "arguments": arguments}}
        try:
            return self._written([[QUESTION, {**_answer(content), "tool_calls": [call]}]], tools, False)[0]
        except Exception:  # it refuses this form, or this conversation
            return ""

    @cached_property
    def adds_bos(self) -> bool:
        """Whether the tokenizer puts a bos token before plain text."""
        return adds_bos(self.tokenizer)

    @cached_property
    def tail(self) -> str:
        """What the template writes after an answer: the end-of-turn token and whatever follows."""
        one, other = self.render([Job([QUESTION, _answer(text)], None, False, "probe") for text in ANSWERS])
        if one == other:
            raise ModelError(
                "the chat template leaves out what messages say.",
                at="data.chat_template",
                do="give a .jinja file that takes the content of a message as a string, not as a list of parts.",
            )
        return one[len(one) - shared_prefix(one[::-1], other[::-1]) :]

    @cached_property
    def end_of_turn(self) -> str | None:
        """The first token in the tail that no text can spell, and those that follow at once. None: there is none."""
        found = re.search(f"({any_of(self.tokenizer.get_added_vocab())})+", self.tail)
        return found.group() if found else None

    def turn_end(self, rendered: str) -> tuple[str, int]:
        """The text of a conversation up to its last turn's end-of-turn token, and how much of it is unchanged.

        Returns: (text, unchanged): text ends with the end-of-turn token; when the template writes none, an eos token
        was put there, and only text[:unchanged] is what the template rendered.
        Raises: ModelError when an eos token is needed and the tokenizer has none.
        """
        if self.end_of_turn and rendered.endswith(self.tail):
            text = rendered[
                : len(rendered) - len(self.tail) + self.tail.index(self.end_of_turn) + len(self.end_of_turn)
            ]
            return text, len(text)
        if self.end_of_turn:  # such as a tool call, which may end in another token
            text = rendered.rstrip()
            if any(text.endswith(name) for name in self.tokenizer.get_added_vocab()):
                return text, len(text)
        else:
            text = (
                rendered[: len(rendered) - len(self.tail)] + self.tail.rstrip()
                if rendered.endswith(self.tail)
                else rendered
            )
        if self.tokenizer.eos_token is None:
            raise ModelError(
                "the chat template ends no answer with a token, and the tokenizer has no eos token.",
                at="data.chat_template",
                do="give a template that ends every assistant turn with a special token.",
            )
        return text + self.tokenizer.eos_token, len(text)

    def stop_token_ids(self) -> list[int]:
        """The token that ends an answer, then eos if it is another."""
        tokens = self.tokenizer.tokenize(self.end_of_turn)[-1:] if self.end_of_turn else []
        names = dict.fromkeys([*tokens, self.tokenizer.eos_token])
        return [self.tokenizer.convert_tokens_to_ids(name) for name in names if name is not None]

    def boundaries(self, prompts: Sequence[Job], texts: list[str]) -> list[int]:
        """How much of the text of each generation prompt is the same before any answer.

        All of it, unless the template opens an answer in another way than it asks for one. A prompt that opens a
        thought stays whole: the answer closes it.
        """
        if self.is_raw:
            return [len(text) for text in texts]
        jobs = [
            replace(job, messages=[*job.messages, _answer(answer)], add_generation_prompt=False)
            for job in prompts
            for answer in ANSWERS
        ]
        answered = iter(self.render(jobs))
        shared = [min(shared_prefix(text, next(answered)), shared_prefix(text, next(answered))) for text in texts]
        return [len(text) if opened_thought(text) else length for text, length in zip(texts, shared, strict=True)]

    @cached_property
    def control_tokens(self) -> re.Pattern[str]:
        """Strings that must not come from a message: as tokens they would end a turn or open another."""
        tokenizer = self.tokenizer
        if self.is_raw:
            return re.compile(re.escape(tokenizer.eos_token))
        names = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        names |= set(tokenizer.all_special_tokens)
        template = tokenizer.chat_template
        source = template if isinstance(template, str) else " ".join((template or {}).values())
        probe = self.render([Job([QUESTION, _answer("b"), QUESTION], None, True, "probe")])[0]
        names |= set(MARKER.findall(source)) | set(MARKER.findall(probe))
        return re.compile(any_of(names))

    def check_text(self, job: Job) -> None:
        """Raises DataError when a message contains a control token."""
        for index, message in enumerate(job.messages):
            if self.is_raw and message["role"] != "assistant":
                continue  # a raw prompt is the user's own rendering
            for text in _strings(message):
                if found := self.control_tokens.search(text):
                    raise DataError(
                        f"{job.place}: messages[{index}] ({message['role']}) contains the control token "
                        f"{found.group()!r}.",
                        do="remove it: the chat template writes these tokens, and a message must not forge a turn.",
                    )


def _answer(text: str | None) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def _strings(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        value = value.values()
    return [text for item in value for text in _strings(item)] if isinstance(value, list | type({}.values())) else []


def opened_thought(prompt: str) -> re.Match[str] | None:
    """The tag at the end of a generation prompt that opens a thought, as DeepSeek-R1's does: group 1 its name."""
    return OPENED_THOUGHT.search(prompt)


def visible_answer(text: str) -> str:
    """An answer without the thought before it: what follows the last closing tag, without the blank lines around."""
    *thought, answer = re.split(r"</(?:think|thinking|thought|reasoning)>", text)
    return answer.strip() if thought else text


def any_of(texts: Iterable[str]) -> str:
    """A pattern that matches any of the texts, the longest first; nothing when there are none."""
    return "|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or r"(?!)"


def shared_prefix(one: str, other: str) -> int:
    """How many characters two texts have in common at their start."""
    if other.startswith(one):
        return len(one)
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
