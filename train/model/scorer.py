"""The live model as an objective sees it: the loss of next tokens, log-probabilities, and the model before training."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tunesmith.kernels.cross_entropy import token_nll
from tunesmith.train.config.config import Kernels
from tunesmith.train.data.store import Batch
from tunesmith.train.errors import TrainingError
from tunesmith.train.model.attention import offering
from tunesmith.train.model.output_head import TargetRows, loss_in_head
from tunesmith.train.model.router_loss import ASKED_BY, RouterLoss


@dataclass(frozen=True)
class TargetNll:
    """The targets of a batch together. num_correct is None where gradients are wanted: it costs a pass."""

    loss: torch.Tensor  # [], sum of weight x negative log-likelihood (nats) over the divisor; float64 without gradients
    num_correct: torch.Tensor | None  # [], targets that no other token is likelier than


@dataclass(frozen=True)
class ExtraLoss:
    """What a model asks for beside the objective: loss is added to the objective's; totals are figures of the step."""

    loss: torch.Tensor  # [], differentiable
    totals: dict[str, torch.Tensor]


class Scorer:
    """Of one model on all ranks. Every rank must ask it the same, in the same order.

    Args:
        model: with the engine's hooks on it; its output head is made to compute losses.
        forward: what the engine calls the model by.
        router_loss: what is added for the routers of experts, in training.
        warn: gets a sentence where the loss cannot be computed inside the head.
    """

    def __init__(
        self,
        model: nn.Module,
        forward: Callable[..., Any],
        target_rows: TargetRows,
        kernels: Kernels,
        device: torch.device,
        router_loss: RouterLoss | None,
        warn: Callable[[str], None],
    ) -> None:
        self.divisor: torch.Tensor | float = 1.0  # of the step's loss, over all ranks
        self.router_loss = router_loss
        self._num_tokens: torch.Tensor | float = 1.0  # of the step, over all ranks
        self._router_losses: list[torch.Tensor] = []  # of forwards that extra_loss() was not asked about yet
        self._model = model
        self._engine_forward = forward
        self._target_rows = target_rows
        self._in_head = None if kernels is Kernels.off else loss_in_head(model, str(kernels), device, warn)

    @property
    def is_in_head(self) -> bool:
        """Whether losses are computed inside the output head, without whole logits."""
        return self._in_head is not None

    def over(self, divisor: torch.Tensor, num_tokens: torch.Tensor) -> "Scorer":
        """The same, for losses that are divided by this, in a step of so many tokens."""
        divided = copy(self)
        divided.divisor, divided._num_tokens, divided._router_losses = divisor, num_tokens, []
        return divided

    def extra_loss(self) -> ExtraLoss | None:
        """What the forwards with gradients since the last call add to the step's loss; None for most models."""
        if self.router_loss is None:
            return None
        aux = torch.stack(self._router_losses).sum() / self._num_tokens
        self._router_losses.clear()
        return ExtraLoss(self.router_loss.coefficient * aux, {"router_aux_loss": aux.detach()})

    def nll(self, batch: Batch) -> TargetNll:
        """The loss of next tokens, computed inside the output head where it can be: the fastest there is.

        The divisor goes into the weights there: gradients then are rounded once less.
        """
        if not torch.is_grad_enabled():
            return self._nll_without_gradients(batch)
        if self._in_head is not None:
            with self._in_head.computing(batch, divisor=self.divisor):
                return TargetNll(self._forward(batch).logits, None)
        labels, weights = batch.targets()
        return TargetNll((token_nll(self.target_logits(batch), labels) * weights).sum() / self.divisor, None)

    def _nll_without_gradients(self, batch: Batch) -> TargetNll:
        labels, weights = batch.targets()
        if self._in_head is not None:
            with self._in_head.computing(batch, return_stats=True) as result:
                self._forward(batch)
            assert result.stats is not None
            nll = -result.stats.logprob_T[batch.target_rows]
            num_correct = result.stats.correct_T.sum()
        else:
            logits = self.target_logits(batch)
            nll, num_correct = token_nll(logits, labels), (logits.argmax(-1) == labels).sum()
        return TargetNll((nll * weights).double().sum() / self.divisor, num_correct)

    def logprobs(self, batch: Batch) -> torch.Tensor:
        """Log-probability of each target in nats, [N] float32, in the order of batch.target_rows; differentiable.

        Computed inside the output head where it can be: the [N, V] logits are then never held.
        """
        if self._in_head is None:
            return -token_nll(self.target_logits(batch), batch.targets()[0])
        with self._in_head.computing(batch, reduction="none"):
            return -self._forward(batch).logits[batch.target_rows]

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Inside, the model answers as before training: its adapter is off, and nothing is differentiated.

        Raises TrainingError where there is no adapter: the weights before training are not there any more.
        """
        disable_adapter = getattr(self._model, "disable_adapter", None)
        if disable_adapter is None:
            raise TrainingError(
                "only a model with an adapter still holds what it was before training.",
                at="adapter.kind",
                do="set adapter=lora, or choose an objective without a reference.",
            )
        was_training = self._model.training
        self._model.eval()
        try:
            with disable_adapter(), torch.no_grad():
                yield
        finally:
            self._model.train(was_training)

    def target_logits(self, batch: Batch) -> torch.Tensor:
        """Logits of the rows whose label counts: [N, V], in the order of batch.target_rows."""
        self._target_rows.rows = batch.target_rows
        try:
            logits: torch.Tensor = self._forward(batch).logits[0]
            return logits
        finally:
            self._target_rows.rows = None

    def _forward(self, batch: Batch) -> Any:
        """The model's outputs, by name: which there are, and in which order, is for its config.json to say."""
        asked: dict[str, Any] = {"use_cache": False, "return_dict": True}
        if self.router_loss is not None:
            asked[ASKED_BY] = torch.is_grad_enabled()
        with offering(batch.segments):
            outputs = self._engine_forward(**batch.inputs, **asked)
        if self.router_loss is None:
            return outputs
        if torch.is_grad_enabled():
            self._router_losses.append(self.router_loss(outputs, batch))
        return outputs
