"""Before a run packs: the live model is asked whether parts of one sequence really do not see each other."""

import math

from tunesmith.train.config.config import Config
from tunesmith.train.engine import Engine
from tunesmith.train.errors import ModelError
from tunesmith.train.model.packing import TOLERANCE, forward_sizes, leak_error, packing_difference
from tunesmith.train.ranks.distributed import max_over_ranks


def check_packing(engine: Engine, config: Config, *, evaluates: bool) -> None:
    """Raises ModelError when a packed record has other logits than alone. Every rank calls it, before training."""
    engine.eval()
    for num_sequences in sorted(forward_sizes(config, evaluates=evaluates)):
        found = packing_difference(engine.module, num_sequences, engine.device)
        difference = max_over_ranks(found if math.isfinite(found) else math.inf, engine.device)
        if difference == math.inf:
            raise ModelError(
                f"the logits of {config.model.name_or_path} are not finite, though its weights are.",
                at="engine.precision",
                do="set engine.precision=bf16 or fp32, whose numbers go beyond the 65504 of fp16; else try the model "
                "in transformers alone.",
            )
        if difference > TOLERANCE[config.engine.precision]:
            raise leak_error(config, engine.module.config, difference, num_sequences)
    engine.train()
