"""The output head of a live model: which rows it sees, and how the loss is computed inside it, without the logits.

What models of transformers (5.23) do with the logits after the head, found by reading every modeling_*.py:
    nothing           llama, qwen, mistral, gpt2, gpt_oss, phi (whose head has a bias), and most others
    z * factor        cohere*: logit_scale; falcon_h1: lm_head_multiplier; hyperclovax: logits_scaling
    z / factor        granite*: logits_scaling (which minicpm3 divides the hidden states by, before the head)
    cap * tanh(z/cap) gemma*, nanochat: final_logit_softcapping; recurrent_gemma: logits_soft_cap;
                      xlstm: output_logit_soft_cap
    both              muse*: output_multiplier, then the cap
    else              inkling*: cut to the tokens that are not padding
One name means different things in different models, so the live model is asked which of these forms is its own.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import nn

from tunesmith.kernels.lce.linear_cross_entropy import TokenStats, linear_cross_entropy
from tunesmith.train.data.store import Batch
from tunesmith.train.errors import TrainingError
from tunesmith.train.ranks.distributed import all_ranks
from tunesmith.train.zero.sharding import full_shape

SCALES = ("logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier")
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
# Largest relative error of a logit. A model's own few roundings to bf16 come to at most 5 x 2^-9 = 1e-2.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}
PROBE_TOKENS = 2


class TargetRows:
    """Lets the output head see only the rows whose label counts.

    A pre-hook on the head, so that whatever the model does around it (scaling, soft-capping, an adapter on the head)
    still happens, at the cost of the rows that are learned from.
    """

    def __init__(self, model: nn.Module) -> None:
        self.rows: torch.Tensor | None = None
        output_head(model).register_forward_pre_hook(self._select)

    def _select(self, module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
        if self.rows is None:
            return None
        return (args[0].flatten(0, 1)[self.rows][None], *args[1:])


def output_head(model: nn.Module) -> Any:
    """The module that turns hidden states into logits. Raises TrainingError where there is none."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    if head is None:
        raise TrainingError(f"{type(model).__name__} has no output embeddings.", do="choose a causal language model.")
    return head


@dataclass(frozen=True)
class Tail:
    """What a model makes of the product of hidden states and head: softcap(scale * logits)."""

    scale: float = 1.0
    softcap: float | None = None

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        scaled = logits * self.scale
        return scaled if self.softcap is None else self.softcap * torch.tanh(scaled / self.softcap)


class UnknownHead(Exception):
    """The loss cannot be computed inside this head; the text says why."""


@dataclass
class HeadResult:
    """What a forward of LossInHead left behind."""

    loss: torch.Tensor | None = None  # weighted sum over the targets, or the loss of each token [B * S]; float32
    stats: TokenStats | None = None  # of every token of the batch, [B * S]


class LossInHead:
    """Computes the loss where the head would compute logits, and lets the model return that loss.

    Inside the forward of the head's own module its weight is whole under ZeRO 3, and the gradients of hidden states and
    weight are computed there and then: a frozen head is not gathered again in the backward. In place of logits the head
    returns an empty tensor, so that what the model does to them costs nothing. The loss leaves the model as its logits,
    in its output, where DeepSpeed looks for what a backward starts from.
    """

    def __init__(self, model: nn.Module, tail: Tail, backend: str) -> None:
        self._head = output_head(model)
        self._tail = tail
        self._backend = backend
        self._batch: Batch | None = None
        self._divisor: torch.Tensor | float = 1.0
        self._return_stats = False
        self._reduction = "sum"
        self._result = HeadResult()
        model.register_forward_hook(self._loss_for_logits, prepend=True)  # before DeepSpeed's look at the output

    @contextmanager
    def computing(
        self,
        batch: Batch,
        *,
        divisor: torch.Tensor | float = 1.0,
        return_stats: bool = False,
        reduction: str = "sum",
    ) -> Iterator[HeadResult]:
        """Inside, one forward of the batch has as logits the weighted sum of the losses of its targets, over the
        divisor; or with reduction="none" the loss of each token, [B * S], unweighted, 0 where it is no target.

        The divisor goes into the weights: the gradients are rounded to 16 bits in the forward, and dividing them in the
        backward would round them once more (1.4 times the error, measured on the CPU).
        """
        self._batch, self._result = batch, HeadResult()
        self._divisor, self._return_stats, self._reduction = divisor, return_stats, reduction
        try:
            with replaced_forward(self._head, self._forward):
                yield self._result
        finally:
            self._batch, self._result = None, HeadResult()

    def _forward(self, hidden_BSD: torch.Tensor) -> torch.Tensor:
        batch, head = self._batch, self._head
        assert batch is not None
        assert self._result.loss is None, "a head that is called twice in one forward is not known"
        result = linear_cross_entropy(
            hidden_BSD.reshape(-1, hidden_BSD.shape[-1]).contiguous(),
            head.weight,
            batch.labels.flatten(),
            bias_V=head.bias,
            weights_T=batch.weights.flatten() / self._divisor if self._reduction == "sum" else None,
            rows_N=batch.target_rows,
            logit_softcap=self._tail.softcap,
            logit_scale=self._tail.scale,
            reduction=self._reduction,
            return_stats=self._return_stats,
            backend=self._backend,
        )
        loss, self._result.stats = result if self._return_stats else (result, None)
        self._result.loss = loss
        # Under ZeRO 3 a gradient can only be kept while its weight is whole: a backward through the output of the
        # module makes DeepSpeed gather it first.
        is_learned = any(parameter.requires_grad for parameter in head.parameters())
        carrier = loss.sum() if is_learned else loss.detach().sum()
        return carrier.to(hidden_BSD.dtype, copy=True).reshape(1, 1, 1)[..., :0]

    def _loss_for_logits(self, module: nn.Module, args: Any, outputs: Any) -> None:
        if self._batch is not None:
            assert self._result.loss is not None
            # a sum over nothing, which leads the backward through the head
            outputs.logits = self._result.loss + outputs.logits.sum()


def loss_in_head(
    model: nn.Module, backend: str, device: torch.device, warn: Callable[[str], None]
) -> LossInHead | None:
    """The loss inside the head, or None with a warning where the model does something unknown to its logits.

    Every rank calls it, once DeepSpeed has the model, and gets the same answer.
    """
    tail, reason = None, "another rank cannot"
    try:
        tail = find_tail(model, device)
    except UnknownHead as error:
        reason = str(error)
    if all_ranks(tail is not None, device) and tail is not None:
        return LossInHead(model, tail, backend)
    warn(
        f"{model_name(model)} computes its loss from whole logits, as with kernels=off, which is slower and takes more "
        f"memory: {reason}."
    )
    return None


def model_name(model: nn.Module) -> str:
    """Name of the model's class, without the adapter's around it."""
    base_model: Callable[[], nn.Module] = getattr(model, "get_base_model", lambda: model)
    return type(base_model()).__name__


@torch.no_grad()
def find_tail(model: nn.Module, device: torch.device) -> Tail:
    """What the live model does with its logits, from one short forward whose logits are known.

    Raises UnknownHead when no form that its config allows fits. Every rank calls it: under ZeRO 3 they go together.
    """
    head = output_head(model)
    if type(head).forward is not nn.Linear.forward or "forward" in vars(head):
        raise UnknownHead(f"its output head is a {type(head).__name__}, not a plain linear layer")
    dtype = head.weight.dtype
    if dtype not in TOLERANCE:
        raise UnknownHead(f"its output head is in {dtype}")
    vocabulary, hidden_size = full_shape(head.weight)
    known = _known_logits(vocabulary).to(device, dtype)
    seen: list[tuple[int, ...]] = []

    def forward(hidden_BSD: torch.Tensor) -> torch.Tensor:
        seen.append(tuple(hidden_BSD.shape))
        return known.clone()  # some models scale in place

    found = _logits_with(model, head, forward, device)
    if seen != [(1, PROBE_TOKENS, hidden_size)]:
        raise UnknownHead(f"its output head sees {seen or 'nothing'}, not the hidden state of every token once")
    if found.shape != known.shape:
        raise UnknownHead(f"its logits are {tuple(found.shape)}, its head's output {tuple(known.shape)}")
    errors = {tail: _relative_error(found, tail(known.double())) for tail in known_tails(model)}
    best = min(errors, key=lambda tail: errors[tail])
    if not errors[best] <= TOLERANCE[dtype]:
        raise UnknownHead(
            f"what it does to its logits is no scale or soft cap that its config names (scale {best.scale:g} and soft "
            f"cap {best.softcap} come closest, {errors[best]:.2g} off)"
        )
    return best


def _known_logits(vocabulary: int) -> torch.Tensor:
    """Logits of both signs from 0.1 to 1000, [1, PROBE_TOKENS, V]: no scale, cap or shift leaves all of them alone."""
    generator = torch.Generator().manual_seed(0)
    exponents, signs = torch.rand(2, 1, PROBE_TOKENS, vocabulary, generator=generator)
    return 10 ** (4 * exponents - 1) * torch.where(signs < 0.5, -1, 1)


def _logits_with(
    model: nn.Module, head: nn.Module, forward: Callable[[torch.Tensor], torch.Tensor], device: torch.device
) -> torch.Tensor:
    """The model's logits when its head does this instead."""
    was_training = model.training
    model.eval()
    positions = torch.arange(PROBE_TOKENS, device=device)[None]
    try:
        with replaced_forward(head, forward):
            outputs = model(
                input_ids=torch.zeros_like(positions), position_ids=positions, use_cache=False, return_dict=True
            )
    finally:
        model.train(was_training)
    logits: torch.Tensor = outputs.logits
    return logits


def known_tails(model: nn.Module) -> list[Tail]:
    """Every form that the numbers in the model's config can stand for."""
    config: Any = model.config
    configs = [config, config.get_text_config()]
    scales: dict[float, None] = {1.0: None}  # a dict: in order, and each once
    softcaps: dict[float | None, None] = {None: None}
    for it in configs:
        for number in (getattr(it, name, None) for name in SCALES):
            if isinstance(number, int | float) and number:
                scales |= {float(number): None, 1 / number: None}
        for number in (getattr(it, name, None) for name in SOFTCAPS):
            if isinstance(number, int | float) and number > 0:
                softcaps[float(number)] = None
    return [Tail(scale, softcap) for scale, softcap in product(scales, softcaps)]


def _relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float(((found.double() - expected) / expected).abs().max())


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """Inside, the module computes this; its hooks, DeepSpeed's among them, go on as they are."""
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
