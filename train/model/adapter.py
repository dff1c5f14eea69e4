"""What is trained: everything, LoRA matrices beside the weights (through PEFT), or the top blocks."""

from torch import nn

from tunesmith.train.config.config import AdapterConfig, AdapterKind
from tunesmith.train.errors import ModelError


def add_adapter(model: nn.Module, adapter: AdapterConfig) -> nn.Module:
    """The model with its adapter; only what is learned requires a gradient. Raises ModelError when it does not fit."""
    if adapter.kind is AdapterKind.lora:
        return _add_lora(model, adapter)
    if adapter.kind is AdapterKind.last_layers:
        _train_last_layers(model, adapter.num_layers or 0)
    return model


def _add_lora(model: nn.Module, adapter: AdapterConfig) -> nn.Module:
    from peft import LoraConfig, TaskType, get_peft_model

    lora = LoraConfig(
        r=adapter.r,
        lora_alpha=adapter.alpha,
        lora_dropout=adapter.dropout,
        target_modules=adapter.target_modules,
        use_rslora=adapter.use_rslora,
        use_dora=adapter.use_dora,
        task_type=TaskType.CAUSAL_LM,
    )
    try:
        # The engine holds fp32 master weights; a second dtype in the model would only split its buffers.
        adapted = get_peft_model(model, lora, autocast_adapter_dtype=False)
    except ValueError as error:
        raise ModelError(
            f"LoRA does not fit this model: {' '.join(str(error).split())[:300]}",
            at="adapter.target_modules",
            do="set adapter.target_modules=all-linear or a list of the model's linear layers.",
        ) from None
    if isinstance(adapter.target_modules, list):
        _check_all_found(adapter.target_modules, adapted.targeted_module_names)
    return adapted


def _check_all_found(wanted: list[str], found: list[str]) -> None:
    """PEFT is content when one name of the list is found; a misspelt one would be left out unsaid."""
    absent = [name for name in wanted if not any(f".{module}".endswith(f".{name}") for module in found)]
    if absent:
        there = ", ".join(sorted({module.rsplit(".", 1)[-1] for module in found}))
        raise ModelError(
            f"the model has no module {', '.join(absent)} for LoRA.",
            at="adapter.target_modules",
            do=f"correct the name (found: {there}), or set adapter.target_modules=all-linear.",
        )


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
