"""Before a run packs: the live model is asked whether parts of one sequence really do not see each other.

Each model of transformers builds its own attention mask, and some leave position_ids out of it (gpt-oss in 5.23:
https://github.com/huggingface/transformers/pull/39997); flash_attention_2 reads them only in forwards of one sequence.
Nothing fails then, and every record but the first is learned with a stranger's text before it. Two short forwards tell.
"""

import torch

from tunesmith.train.config.config import Config, Packing, Precision
from tunesmith.train.engine import Engine
from tunesmith.train.errors import ModelError
from tunesmith.train.ranks.distributed import all_ranks

RECORD_TOKENS = 8
# Relative difference of the second record's logits, packed and alone. Measured on two-layer models of seven families:
# up to 4e-7 in fp32 and 7e-3 in bf16 by rounding; by a leak 0.03 (weights drawn at 0.02) to 1.2 (drawn at 0.2).
TOLERANCE = {Precision.fp32: 1e-3, Precision.bf16: 0.1, Precision.fp16: 0.1}


def check_packing(engine: Engine, config: Config, *, evaluates: bool) -> None:
    """Raises ModelError when a packed record has other logits than alone. Every rank calls it, before training."""
    packs = config.batch.packing is not Packing.none
    sizes = {config.batch.micro_batch_size} | ({config.evaluate.batch_size} if evaluates else set())
    for num_sequences in sorted(sizes):
        difference = packing_difference(engine, num_sequences)
        if all_ranks(difference <= TOLERANCE[config.engine.precision], engine.device):
            continue
        attention = engine.module.config._attn_implementation
        raise ModelError(
            f"{config.model.name_or_path} with {attention} attention lets packed records see each other: their logits "
            f"are {difference:.0%} off in forwards of {num_sequences} sequences.",
            at="batch.packing" if packs else "model.attention",
            do="set batch.packing=none, or try another model.attention."
            if packs
            else "try another model.attention: answers that are compared share a sequence.",
        )


@torch.no_grad()
def packing_difference(engine: Engine, num_sequences: int) -> float:
    """How far the logits of the second of two packed records are from those it has alone, relative to their spread."""
    vocabulary = engine.module.get_input_embeddings().num_embeddings
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocabulary, (num_sequences, 2 * RECORD_TOKENS), generator=generator).to(engine.device)
    positions = torch.arange(RECORD_TOKENS, device=engine.device).expand(num_sequences, -1)
    engine.eval()
    packed = _logits(engine, ids, positions.repeat(1, 2))[:, RECORD_TOKENS:]
    alone = _logits(engine, ids[:, RECORD_TOKENS:], positions)
    engine.train()
    return float((packed - alone).norm() / (alone - alone.mean(-1, keepdim=True)).norm())


def _logits(engine: Engine, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
    return engine.module(input_ids=input_ids, position_ids=position_ids, use_cache=False).logits.float()
