"""What the model has learned: loss and accuracy on the validation tokens, and the answers it gives.

Sums over tokens, never means of means, so that no figure depends on the batch size or the number of ranks.
"""

import math
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from tunesmith.train.data.store import TokenStore
from tunesmith.train.ranks.distributed import World, sum_over_ranks
from tunesmith.train.ranks.progress import reach

if TYPE_CHECKING:
    from tunesmith.train.engine import Engine


@torch.no_grad()
def evaluate(
    engine: "Engine",
    store: TokenStore,
    *,
    batch_size: int,
    world: World,
    pad_token_id: int,
    before_batch: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Token-weighted loss (nats), perplexity and token accuracy over a split. Every rank calls it and gets the same.

    Each sequence is seen once; ranks that run out get empty ones, because under ZeRO 3 all of them must go forward
    together. before_batch is called before each of them, and may raise to leave the evaluation.
    """
    engine.eval()
    sums = torch.zeros(4, dtype=torch.float64, device=engine.device)  # weighted loss, weight, correct, targets
    for sequence_ids in rank_batches(store.num_sequences, batch_size, world):
        reach("evaluating")
        before_batch()
        batch = store.micro_batch(sequence_ids, pad_token_id=pad_token_id).to(engine.device)
        loss_sum, num_correct = engine.loss_sum_and_num_correct(batch)
        sums[0] += loss_sum
        sums[1] += batch.targets()[1].double().sum()
        sums[2] += num_correct
        sums[3] += batch.num_target_tokens
    engine.train()
    total_loss, weight, total_correct, num_targets = sum_over_ranks(sums).tolist()
    loss = total_loss / weight
    return {
        "eval/loss": loss,
        "eval/perplexity": math.exp(loss) if loss < 700 else math.inf,
        "eval/token_accuracy": total_correct / num_targets,
    }


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
