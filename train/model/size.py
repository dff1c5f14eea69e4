"""How many parameters a model has, and which of them a token is multiplied with."""

import math
from dataclasses import dataclass

from torch import nn

from tunesmith.train.zero.sharding import full_shape


@dataclass(frozen=True)
class ModelSize:
    """Parameters of the model, adapter included; matmul: those a token is multiplied with (arXiv:2204.02311)."""

    parameters: int
    trainable: int
    matmul: int
    trainable_matmul: int


def model_size(model: nn.Module) -> ModelSize:
    """Counts whole parameters, also where ZeRO 3 has split them; a tied embedding counts once, as the head."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    head_parameters = {id(p) for p in head.parameters()} if head is not None else set()
    looked_up = {
        id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()
    } - head_parameters
    total = trainable = matmul = trainable_matmul = 0
    for parameter in model.parameters():
        shape = full_shape(parameter)
        count = math.prod(shape)
        multiplied = count if len(shape) >= 2 and id(parameter) not in looked_up else 0
        total += count
        matmul += multiplied
        if parameter.requires_grad:
            trainable += count
            trainable_matmul += multiplied
    return ModelSize(total, trainable, matmul, trainable_matmul)
