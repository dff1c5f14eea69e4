"""What is trained: everything, LoRA matrices beside the weights (through PEFT), or the top blocks."""

import math

from torch import nn

from tunesmith.train.config.config import AdapterConfig, AdapterKind
from tunesmith.train.errors import ModelError
from tunesmith.train.model.targets import Targets, find_targets, shortest_names
from tunesmith.train.zero.sharding import full_shape


def add_adapter(model: nn.Module, adapter: AdapterConfig) -> nn.Module:
    """The model with its adapter; only what is learned requires a gradient. Raises ModelError when it does not fit."""
    if adapter.kind is AdapterKind.lora:
        return _add_lora(model, adapter)
    if adapter.kind is AdapterKind.last_layers:
        _train_last_layers(model, adapter.num_layers or 0)
    return model


def _add_lora(model: nn.Module, adapter: AdapterConfig) -> nn.Module:
    from peft import LoraConfig, TaskType, get_peft_model

    targets = find_targets(model, adapter)
    if targets.parameters and (adapter.dropout or adapter.use_dora):
        raise _not_beside_parameters(targets, adapter)
    lora = LoraConfig(
        r=adapter.r,
        lora_alpha=adapter.alpha,
        lora_dropout=adapter.dropout,
        target_modules=shortest_names(targets.modules, (name for name, _ in model.named_modules())),
        target_parameters=shortest_names(targets.parameters, (name for name, _ in model.named_parameters())) or None,
        use_rslora=adapter.use_rslora,
        use_dora=adapter.use_dora,
        task_type=TaskType.CAUSAL_LM,
    )
    try:
        # The engine holds fp32 master weights; a second dtype in the model would only split its buffers.
        return get_peft_model(model, lora, autocast_adapter_dtype=False)
    except ValueError as error:
        raise ModelError(
            f"LoRA does not fit this model: {' '.join(str(error).split())[:300]}",
            at="adapter.target_modules",
            do="name other layers of the model in adapter.target_modules, or choose another adapter.",
        ) from None


def _not_beside_parameters(targets: Targets, adapter: AdapterConfig) -> ModelError:
    """LoRA on a parameter adds to the weight itself: there is no input to drop from, and no layer to take a norm of."""
    setting, instead = ("use_dora", "false") if adapter.use_dora else ("dropout", "0")
    dense = ",".join(sorted({name.rpartition(".")[-1] for name in targets.modules}))
    return ModelError(
        f"adapter.{setting} does not go with LoRA on {len(targets.parameters)} parameters that are adapted as such, "
        f"such as {targets.parameters[0]}: only layers that stand for themselves can have it.",
        at=f"adapter.{setting}",
        do=f"set adapter.{setting}={instead}"
        + (f", or adapt the other layers alone: adapter.target_modules=[{dense}]." if dense else "."),
    )


def adapted_lines(model: nn.Module) -> list[str]:
    """What LoRA adapts and what it leaves as it is, a line for each kind of matrix; none where there is no LoRA."""
    from peft.tuners.lora.layer import LoraLayer

    adapted: dict[str, list[int]] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            own = [parameter for key, parameter in layer.named_parameters() if "base_layer" not in key]
            count = adapted.setdefault(_kind(f"{name}.{getattr(layer, 'parameter_name', '')}"), [0, 0])
            count[0] += getattr(layer, "num_experts", 1)
            count[1] += sum(math.prod(full_shape(parameter)) for parameter in own)
    named = ((name, parameter) for name, parameter in model.named_parameters() if not parameter.requires_grad)
    matrices = dict.fromkeys(_kind(name) for name, parameter in named if len(full_shape(parameter)) > 1)
    frozen = [kind for kind in matrices if kind not in adapted]
    lines = [f"{kind}: {count:,} adapted, {learned:,} parameters" for kind, (count, learned) in adapted.items()]
    return [*lines, f"not adapted: {', '.join(frozen)}"] if lines and frozen else lines


def _kind(name: str) -> str:
    """What a matrix is called in every block: self_attn.q_proj of base_model.model.model.layers.0.self_attn.q_proj."""
    parts = [part for part in name.split(".") if part not in ("base_model", "model", "base_layer", "weight", "")]
    numbered = [place for place, part in enumerate(parts) if part.isdigit()]
    return ".".join(part for part in parts[numbered[0] + 1 if numbered else 0 :] if not part.isdigit())


def _train_last_layers(model: nn.Module, num_layers: int) -> None:
    blocks = transformer_blocks(model)
    if num_layers > len(blocks):
        raise ModelError(
            f"adapter.num_layers={num_layers}, but the model has {len(blocks)} blocks.",
            at="adapter.num_layers",
            do=f"set it to {len(blocks)} or less.",
        )
    model.requires_grad_(False)
    for block in blocks[len(blocks) - num_layers :]:
        block.requires_grad_(True)


def transformer_blocks(model: nn.Module) -> nn.ModuleList:
    """The model's stack of blocks: its longest list of modules."""
    stacks = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module)]
    if not stacks:
        raise ModelError(f"{type(model).__name__} has no list of blocks.", at="adapter", do="choose another adapter.")
    return max(stacks, key=len)
