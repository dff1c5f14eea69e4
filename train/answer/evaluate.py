"""What the model has learned: the objective's figures of the validation split.

Sums, never means of means, so that no figure depends on the batch size or the number of ranks.
"""

from collections.abc import Callable

import torch

from tunesmith.train.data.order import rank_batches
from tunesmith.train.data.store import TokenStore
from tunesmith.train.engine import Engine
from tunesmith.train.objective.objective import Objective, add_to
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
    totals: dict[str, torch.Tensor] = {}
    for sequence_ids in rank_batches(store.num_sequences, batch_size, world):
        reach(Phase.evaluating)
        before_batch()
        batch = store.batch(sequence_ids, pad_token_id=pad_token_id).to(engine.device)
        add_to(totals, objective.sums(engine.scorer, batch).totals, engine.device)
    engine.train()
    added = sum_over_ranks(torch.stack(list(totals.values()))).tolist()
    return {f"eval/{name}": value for name, value in objective.metrics(dict(zip(totals, added, strict=True))).items()}
