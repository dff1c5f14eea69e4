"""The auxiliary loss of a mixture of experts, which keeps its router from sending every token to the same few.

    aux = E x sum over experts e of (assignments of tokens to e, per token) x (mean probability of e)

over all layers together, padding left out (arXiv:2101.03961, equations 4 to 6; as transformers computes it). It is a
product of two means over the tokens of one forward, so a sum over micro batches is not that of the whole batch. A step
takes the mean of its forwards on all ranks, each weighed by its tokens: what the split still changes is how far
forwards differ in what they send where, and nothing else. transformers.Trainer adds one to each micro batch's loss
instead, so that twice the accumulation steps double it.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from tunesmith.train.config.config import ModelConfig
from tunesmith.train.data.store import Batch
from tunesmith.train.errors import ModelError

COEFFICIENTS = ("router_aux_loss_coef", "aux_loss_coef")  # attributes of transformers' models (5.23)
ASKED_BY = "output_router_logits"  # of a config.json, and an argument of forward()


class RouterLoss:
    """What is added to the loss of a step beside the objective's."""

    def __init__(self, coefficient: float, top_k: int) -> None:
        self.coefficient = coefficient
        self._top_k = top_k

    def __call__(self, outputs: Any, batch: Batch) -> torch.Tensor:
        """Of one forward, before the coefficient and weighed by its tokens: [], float32, differentiable."""
        width = batch.labels.shape[1]
        is_token = torch.arange(width, device=batch.lengths.device) < batch.lengths[:, None]
        return batch.num_tokens * load_balancing_loss(outputs.router_logits, self._top_k, is_token.flatten().float())


def load_balancing_loss(router_logits: Sequence[torch.Tensor], top_k: int, weights_T: torch.Tensor) -> torch.Tensor:
    """aux of the formula above: [], float32. router_logits: of each layer, [T, E]; weights_T: 1, or 0 for padding."""
    sent: Any = 0.0  # [E], assignments
    likely: Any = 0.0  # [E], probabilities
    for logits_TE in router_logits:
        probabilities_TE = logits_TE.reshape(len(weights_T), -1).float().softmax(-1)
        chosen_Tk = probabilities_TE.topk(top_k).indices
        sent = sent + weights_T @ torch.zeros_like(probabilities_TE).scatter_(1, chosen_Tk, 1.0)
        likely = likely + weights_T @ probabilities_TE
    count = (weights_T.sum() * len(router_logits)).clamp_min(1)  # an empty micro batch has none
    return len(sent) * (sent / count * likely / count).sum()


def find_router_loss(model: Any, settings: ModelConfig, warn: Callable[[str], None]) -> RouterLoss | None:
    """What the model's config.json or model.router_aux_loss_coef asks for, if anything.

    Raises ModelError where the setting asks for what the model does not have; warns where its config.json does.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    wanted = settings.router_aux_loss_coef
    asked = getattr(base.config, ASKED_BY, False) if wanted is None else wanted > 0
    if not asked:
        return None
    top_k = _first(base, ("num_experts_per_tok",))
    coefficient = _first(base, COEFFICIENTS) if wanted is None else wanted
    if ASKED_BY in inspect.signature(base.forward).parameters and top_k and coefficient is not None:
        return RouterLoss(float(coefficient), int(top_k)) if coefficient else None
    problem = f"{type(base).__name__} has no auxiliary loss of its routers that Tunesmith knows"
    if wanted is None:
        warn(f"{problem}: {ASKED_BY} in its config.json changes nothing")
        return None
    raise ModelError(f"{problem}.", at="model.router_aux_loss_coef", do="leave it out, or choose another model.")


def _first(model: nn.Module, names: Sequence[str]) -> Any:
    """Of the model or its config: DBRX has them in another part of its config."""
    places = (model, model.config, model.config.get_text_config())  # type: ignore[union-attr,operator]
    found = (getattr(place, name, None) for name in names for place in places)
    return next((value for value in found if value is not None), None)
