"""What a forward keeps for its backward, in bytes, counted on meta tensors before a weight is loaded."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tunesmith.kernels.attention.segments import Segments
from tunesmith.train.config.config import Attention, Config, Kernels
from tunesmith.train.model.adapter import add_adapter, transformer_blocks
from tunesmith.train.model.attention import offering, use_segments
from tunesmith.train.model.load import DTYPES, empty_model, quiet_transformers
from tunesmith.train.model.lora_layers import use_lora_kernels
from tunesmith.train.model.recompute import chosen_blocks

META = torch.device("meta")


@dataclass(frozen=True)
class Activations:
    """Bytes that one forward of a rank keeps for its backward; weights are not among them."""

    blocks: tuple[int, ...]  # of each block, its input included
    around: int  # before the first block and after the last, without the output head
    block_input: int  # hidden states between two blocks

    def of(self, times: int) -> "Activations":
        """Those of a forward of so many times the sequences."""
        return Activations(tuple(times * block for block in self.blocks), times * self.around, times * self.block_input)

    def kept(self, recomputed: int) -> int:
        """Bytes at the end of a forward in which so many blocks keep their input alone."""
        chosen = chosen_blocks(recomputed, len(self.blocks))
        return self.around + sum(
            self.block_input if again else own for own, again in zip(self.blocks, chosen, strict=True)
        )


def count_activations(model: Any, inputs: dict[str, torch.Tensor], segments: Segments) -> Activations:
    """Counts them in one forward of a model without its output head, on the model's device, which may be meta."""
    blocks = transformer_blocks(model)
    weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    held: dict[int, torch.UntypedStorage] = {}  # kept, so that no second one gets the same address
    bytes_of, inputs_of = [0], list[int]()

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights and storage._cdata not in held:
            held[storage._cdata] = storage
            bytes_of[-1] += storage.nbytes()
        return tensor

    def begin(block: nn.Module, args: tuple[Any, ...], given: dict[str, Any]) -> None:
        hidden = args[0] if args else given["hidden_states"]
        inputs_of.append(hidden.numel() * hidden.element_size())
        bytes_of.append(0)

    hooks = [block.register_forward_pre_hook(begin, with_kwargs=True) for block in blocks]
    hooks.append(blocks[-1].register_forward_hook(lambda *_: bytes_of.append(0)))
    try:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), offering(segments):
            model.get_decoder()(**inputs, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return Activations(tuple(bytes_of[1:-1]), bytes_of[0] + bytes_of[-1], max(inputs_of))


def predict_activations(config: Config, hf_config: Any, num_sequences: int) -> tuple[Activations, nn.Module]:
    """Those of a run's forward of so many sequences, and the model without its weights; reads none.

    Raises whatever a model's code makes of meta tensors, such as one that looks into them.
    """
    with quiet_transformers(), META:
        model: Any = empty_model(config.model, hf_config, DTYPES[config.engine.precision])
        if config.model.attention is Attention.segments:
            use_segments(model)
        model = add_adapter(model, config.adapter)
        for parameter in model.parameters():  # PEFT gives its own the dtype of the layer's, but for meta tensors
            parameter.data = parameter.data.to(DTYPES[config.engine.precision])
        if config.kernels is not Kernels.off:
            use_lora_kernels(model, Kernels.torch, sharded=config.engine.stage == 3)
    model.train()
    shape = num_sequences, config.batch.sequence_length
    positions = torch.arange(shape[1], device=META).expand(shape)
    inputs = {"input_ids": torch.zeros(shape, dtype=torch.int64, device=META), "position_ids": positions}
    return count_activations(model, inputs, Segments.of_rows([[shape[1]]] * shape[0], META)), model
