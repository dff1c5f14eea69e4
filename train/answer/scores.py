"""What generated answers are worth beside the expected ones."""

import re
from collections.abc import Sequence


def same_answer(generated: str, expected: str) -> bool:
    """Exact match, up to white space."""
    return _folded(generated) == _folded(expected)


def _folded(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip()


def answer_metrics(generated: Sequence[str], expected: Sequence[str]) -> dict[str, float]:
    """Exact match and ROUGE-L F1, means over the answers."""
    if not expected:
        return {}
    rouge = [rouge_l(got, want) for got, want in zip(generated, expected, strict=True)]
    exact = [same_answer(got, want) for got, want in zip(generated, expected, strict=True)]
    return {"eval/exact_match": sum(exact) / len(exact), "eval/rouge_l": sum(rouge) / len(rouge)}


def rouge_l(generated: str, expected: str) -> float:
    """ROUGE-L F1 of two texts, as rouge-score 0.1.2 gives it without stemming: of words of a-z and 0-9, in lower case.

    Source: Lin, 2004, "ROUGE: A Package for Automatic Evaluation of Summaries", section 3.1.
    """
    got, want = (re.findall(r"[a-z0-9]+", text.lower()) for text in (generated, expected))
    longest = _longest_common_subsequence(got, want)
    if not longest:
        return 0.0
    precision, recall = longest / len(got), longest / len(want)
    return 2 * precision * recall / (precision + recall)


def _longest_common_subsequence(left: list[str], right: list[str]) -> int:
    """Its length, by the textbook's table, of which one row is kept."""
    row = [0] * (len(right) + 1)
    for word in left:
        above_left = 0
        for column, other in enumerate(right, start=1):
            above = row[column]
            row[column] = above_left + 1 if word == other else max(above, row[column - 1])
            above_left = above
    return row[-1]
