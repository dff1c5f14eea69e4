"""What the model has learned: the objective's figures of the validation split, and the answers it gives.

Sums over tokens, never means of means, so that no figure depends on the batch size or the number of ranks.
"""

import re
from collections.abc import Callable, Sequence

import torch

from tunesmith.train.data.store import TokenStore
from tunesmith.train.engine import Engine
from tunesmith.train.objective.objective import Objective, add_up
from tunesmith.train.ranks.distributed import World, sum_over_ranks
from tunesmith.train.ranks.phases import Phase
from tunesmith.train.ranks.progress import reach


@torch.no_grad()
def evaluate(
    engine: Engine,
    objective: Objective,
    store: TokenStore,
    *,
    batch_size: int,
    world: World,
    pad_token_id: int,
    before_batch: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """The objective's figures of a split, as eval/<name>: its sums without gradients. Every rank gets the same.

    Each sequence is seen once; ranks that run out get empty ones, because under ZeRO 3 all of them must go forward
    together. before_batch is called before each of them, and may raise to leave the evaluation.
    """
    engine.eval()
    totals = []
    for sequence_ids in rank_batches(store.num_sequences, batch_size, world):
        reach(Phase.evaluating)
        before_batch()
        batch = store.batch(sequence_ids, pad_token_id=pad_token_id).to(engine.device)
        totals.append(objective.sums(engine.scorer, batch).totals)
    engine.train()
    names = list(totals[0])
    added = sum_over_ranks(add_up(totals, names, engine.device)).tolist()
    return {f"eval/{name}": value for name, value in objective.metrics(dict(zip(names, added, strict=True))).items()}


def rank_batches(num_items: int, batch_size: int, world: World) -> list[list[int]]:
    """This rank's batches of item numbers, as many as on every other rank; -1 stands for no item."""
    stride = batch_size * world.world_size
    batches = []
    for start in range(0, num_items, stride):
        first = start + world.rank * batch_size
        batches.append([i if i < num_items else -1 for i in range(first, first + batch_size)])
    return batches


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
