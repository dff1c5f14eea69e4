"""Texts -> token ids, such that the ids before an answer are those of its prompt alone: what a server will send.

A text is tokenised as a whole. That gives other ids than the prompt alone gives where a token would cross the start of
the answer, and where a tokenizer looks ahead: GPT-2's makes one token of "\\n\\n" at the end of a prompt, and two of it
before a word. There, and only there, the text is cut and both parts are tokenised by themselves.
"""

from bisect import bisect_right
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from transformers import PreTrainedTokenizerBase

MAX_KEPT_CHARACTERS = 64  # of a prompt's end whose ids are remembered: templates end nearly all prompts alike


@dataclass(frozen=True)
class Tokens:
    """A tokenised text."""

    ids: list[int]
    starts: list[int]  # first character of each token
    ends: list[int]  # character after the last
    cuts: list[int] = field(default_factory=list)  # characters at which the text was cut
    crossed: list[int] = field(default_factory=list)  # characters at which it should have been cut, but can't be

    @classmethod
    def of(cls, encoding: Any) -> "Tokens":
        """From a `tokenizers.Encoding`."""
        offsets = encoding.offsets
        return cls(encoding.ids, [start for start, _ in offsets], [end for _, end in offsets])


class Encoder:
    """Tokenises texts without adding special tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.added_ids = frozenset(tokenizer.get_added_vocab().values())
        self.known: dict[str, list[int]] = {}

    def encode(self, texts: list[str]) -> list[Tokens]:
        """Each text by itself."""
        return [Tokens.of(encoding) for encoding in self._encodings(texts)]

    def encode_answers(self, texts: list[str], boundaries: list[list[int]]) -> list[Tokens]:
        """Each text with the ids before each boundary as its prompt alone has them.

        Args:
            boundaries: of each text, the characters at which its answers start.
        """
        tokens = self.encode(texts)
        ends = [
            [_prompt_end(text, one, boundary, self.added_ids) for boundary in found]
            for text, one, found in zip(texts, tokens, boundaries, strict=True)
        ]
        unknown = list({end for found in ends for end, _ in found if end not in self.known})
        alone = dict(zip(unknown, (one.ids for one in self.encode(unknown)), strict=True))
        self.known.update((end, ids) for end, ids in alone.items() if len(end) <= MAX_KEPT_CHARACTERS)
        for index, (found, places) in enumerate(zip(ends, boundaries, strict=True)):
            cuts = [
                place
                for place, (end, ids) in zip(places, found, strict=True)
                if ids != (alone[end] if end in alone else self.known[end])
            ]
            if cuts:
                tokens[index] = self._apart(texts[index], tokens[index], cuts)
        return tokens

    def _apart(self, text: str, whole: Tokens, cuts: list[int]) -> Tokens:
        """The parts of a text tokenised by themselves, or the whole where that would spell something else: some
        tokenizers put a space before every text.
        """
        parts = [(start, text[start:end]) for start, end in pairwise([0, *cuts, len(text)]) if end > start]
        encodings = self._encodings([part for _, part in parts])
        spelled = "".join(token for encoding in encodings for token in encoding.tokens)
        if spelled != "".join(self.tokenizer.convert_ids_to_tokens(whole.ids)):
            return Tokens(whole.ids, whole.starts, whole.ends, crossed=cuts)
        ids: list[int] = []
        starts: list[int] = []
        ends: list[int] = []
        for (shift, _), encoding in zip(parts, encodings, strict=True):
            ids += encoding.ids
            starts += [shift + start for start, _ in encoding.offsets]
            ends += [shift + end for _, end in encoding.offsets]
        return Tokens(ids, starts, ends, cuts=cuts)

    def _encodings(self, texts: list[str]) -> list[Any]:
        if not texts:
            return []
        batch = self.tokenizer(
            texts, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False, verbose=False
        )
        return batch.encodings


def _prompt_end(text: str, tokens: Tokens, boundary: int, added_ids: frozenset[int]) -> tuple[str, list[int]]:
    """A prompt's last added token with what follows up to the boundary, and the ids that the whole text has there.

    Text is never merged across an added token, so if the end has the same ids alone, so has the whole prompt. It has
    others where a token crosses the boundary, which is not among the ids here.
    """
    last = bisect_right(tokens.ends, boundary)
    first = last - 1
    while first >= 0 and tokens.ids[first] not in added_ids:
        first -= 1
    start = tokens.starts[first] if first >= 0 else 0
    return text[start:boundary], tokens.ids[max(first, 0) : last]
