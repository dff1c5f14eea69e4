"""Which calls of our kernels a run will make, so that rank 0 times the candidates for them and all ranks use its pick.

Only on CUDA, before the engine takes the memory. The first run on a GPU waits for it, later ones read the file.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from tunesmith.kernels.timed_pick import Workload, pick, picks_as_json, use_picks
from tunesmith.kernels.timed_workloads import lora_workload, loss_workload
from tunesmith.train.config.config import Config
from tunesmith.train.errors import TrainingError
from tunesmith.train.model.lora_layers import GROUPS, why_left_to_peft
from tunesmith.train.model.output_head import SOFTCAPS, output_head
from tunesmith.train.ranks.distributed import World, all_ranks, broadcast_text
from tunesmith.train.zero.sharding import full_shape

MOST_ROWS = 8192  # enough to fill any GPU: more only takes longer


def use_timed_picks(
    model: nn.Module, config: Config, world: World, device: torch.device, warn: Callable[[str], None]
) -> None:
    """Rank 0 picks, every rank uses it. Raises TrainingError on all of them where no kernel computes what it should."""
    text, fault = None, None
    if world.rank == 0:
        try:
            text = picks_as_json(pick(workloads_of(model, config, device), device), device)
        except torch.OutOfMemoryError:
            warn("block sizes are the default ones: there is no memory to time the others in.")
            text = picks_as_json({}, device)
        except RuntimeError as error:  # a kernel that is wrong on this GPU
            fault = str(error)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    if not all_ranks(fault is None, device):
        raise TrainingError(f"timing the kernels failed: {fault or 'rank 0 says why'}.", do="set kernels=torch.")
    use_picks(broadcast_text(text, device), device)


def workloads_of(model: nn.Module, config: Config, device: torch.device) -> list[Workload]:
    """The loss, and each kind of LoRA layer or group of layers once."""
    rows = min(config.batch.micro_batch_size * config.batch.sequence_length, MOST_ROWS)
    head: Any = output_head(model)
    found = {}
    if isinstance(head, nn.Linear):
        weight: Any = head.weight
        vocab_size, hidden_size = full_shape(weight)
        found["loss"] = loss_workload(
            rows, hidden_size, vocab_size, weight.dtype, device,
            trainable=weight.requires_grad, bias=head.bias is not None,
            softcap=_softcap(model),
        )  # fmt: skip
    for names in _lora_groups(model, alone=config.engine.stage == 3):
        layers = [model.get_submodule(name) for name in names]
        shapes = [_lora_shape(layer) for layer in layers]
        in_features, _, _, dropout_p, dtype = shapes[0]
        outs, ranks = [shape[1] for shape in shapes], [shape[2] for shape in shapes]
        workload = lora_workload(rows, in_features, outs, ranks, dtype, device, dropout_p=dropout_p)
        found[workload.name] = workload
    return list(found.values())


def _softcap(model: Any) -> float | None:
    """Of the logits, as the config has it: whether the loss has one decides its tiles, not the number."""
    config = model.config.get_text_config()
    return next((cap for cap in (getattr(config, name, None) for name in SOFTCAPS) if cap), None)


def _lora_groups(model: nn.Module, *, alone: bool) -> Iterator[list[str]]:
    """Names of the LoRA layers that our kernels compute, those of one call together."""
    from peft.tuners.lora.layer import LoraLayer

    replaced = [
        name for name, module in model.named_modules() if isinstance(module, LoraLayer) and not why_left_to_peft(module)
    ]
    grouped: dict[tuple[str, object], list[str]] = {}
    for name in replaced:
        parent, _, child = name.rpartition(".")
        family = next((names for names in GROUPS if child in names), None)
        is_plain = not alone and family is not None and not model.get_submodule(name).lora_magnitude_vector
        grouped.setdefault((parent, family) if is_plain else (name, None), []).append(name)
    yield from grouped.values()


def _lora_shape(layer: nn.Module) -> tuple[int, int, int, float, torch.dtype]:
    """In features, out features, rank, dropout and dtype of the one adapter of a layer."""
    (adapter,) = (name for name in layer.active_adapters if name in layer.lora_A)  # type: ignore[union-attr,operator]
    weight_a, weight_b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight  # type: ignore[index,union-attr]
    (rank, in_features), (out_features, _) = full_shape(weight_a), full_shape(weight_b)
    dropout = layer.lora_dropout[adapter]  # type: ignore[index]
    return in_features, out_features, rank, float(getattr(dropout, "p", 0.0)), weight_a.dtype
