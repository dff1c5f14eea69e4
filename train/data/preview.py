"""Some records token by token, with the targets coloured, as the model will see them."""

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from tunesmith.train.data.store import TokenStore
from tunesmith.train.printable import printable

TARGET_STYLES = ("black on green", "black on bright_green")  # turn about, so that one sees where a token ends
PROMPT_STYLES = ("", "dim")
OPEN, CLOSE = "[[", "]]"  # around the targets where there are no colours


class _Record:
    """One record; in colour on a terminal, with [[ ]] around the targets elsewhere."""

    def __init__(self, place: str, tokens: list[str], weights: list[float]) -> None:
        self.place = printable(place)
        self.tokens = [printable(token) for token in tokens]
        self.weights = weights

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        has_colours = options.is_terminal and console.color_system is not None
        num_targets = sum(weight > 0 for weight in self.weights)
        yield Text(f"{self.place}: {len(self.tokens)} tokens, {num_targets} targets", style="bold")
        yield self._coloured() if has_colours else Text(self._marked())

    def _coloured(self) -> Text:
        text = Text()
        for index, (token, weight) in enumerate(zip(self.tokens, self.weights, strict=True)):
            text.append(token, style=(TARGET_STYLES if weight > 0 else PROMPT_STYLES)[index % 2])
        return text

    def _marked(self) -> str:
        parts = []
        was_target = False
        for token, weight in zip(self.tokens, self.weights, strict=True):
            if (weight > 0) is not was_target:
                parts.append(CLOSE if was_target else OPEN)
                was_target = weight > 0
            parts.append(token)
        return "".join(parts) + (CLOSE if was_target else "")


def preview(tokenizer: PreTrainedTokenizerBase, store: TokenStore, n: int) -> RenderableType:
    """The first n records of a store, for a rich console to print. Raises nothing; fewer records are fewer."""
    places = store.places()
    records = []
    for index in range(min(n, store.num_records)):
        ids, weights = store.record(index)
        records.append(
            _Record(places[index], _spellings(tokenizer, ids.tolist()), [float(weight) for weight in weights])
        )
    return Group(*records)


def _spellings(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[str]:
    """What each token adds to the text. Of the tokens that spell one character together, the last has it."""
    spellings = []
    first = previous = 0  # tokens before `previous` are shown; from `first` on they are decoded again, for their spaces
    for end in range(1, len(ids) + 1):
        shown = tokenizer.decode(ids[first:previous], clean_up_tokenization_spaces=False)
        text = tokenizer.decode(ids[first:end], clean_up_tokenization_spaces=False)
        if text.endswith("\ufffd"):  # not a whole character yet
            spellings.append("")
            continue
        spellings.append(text[len(shown) :])
        first, previous = previous, end
    return spellings
