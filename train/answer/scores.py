"""What generated answers are worth beside the expected ones."""

import re
from collections.abc import Sequence


def same_answer(generated: str, expected: str) -> bool:
    """Exact match, up to white space."""
    return _folded(generated) == _folded(expected)


def _folded(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip()


def answer_metrics(generated: Sequence[str], expected: Sequence[str]) -> dict[str, float]:
    """Exact match and ROUGE-L F1 (Lin, 2004; rouge-score without stemming), means over the answers."""
    from rouge_score.rouge_scorer import RougeScorer

    if not expected:
        return {}
    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    rouge = [scorer.score(want, got)["rougeL"].fmeasure for got, want in zip(generated, expected, strict=True)]
    exact = [same_answer(got, want) for got, want in zip(generated, expected, strict=True)]
    return {"eval/exact_match": sum(exact) / len(exact), "eval/rouge_l": sum(rouge) / len(rouge)}
