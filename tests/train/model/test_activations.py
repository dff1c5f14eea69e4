"""What is foreseen of a forward on meta tensors is what a forward of the live model keeps."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tunesmith.kernels.attention.segments import Segments
from tunesmith.train.config.compose import compose_config
from tunesmith.train.config.config import Config
from tunesmith.train.errors import ModelError
from tunesmith.train.model.activations import Activations, count_activations, predict_activations
from tunesmith.train.model.block_kernels import use_block_kernels
from tunesmith.train.model.load import check_model, load_model
from tunesmith.train.model.lora_layers import use_lora_kernels
from tunesmith.train.model.packing import settle
from tunesmith.train.model.recompute import chosen_blocks, possible_numbers, recompute_blocks
from tunesmith.train.ranks.distributed import World

CPU = torch.device("cpu")
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"num_hidden_layers": 4},
    "qwen3": {"num_hidden_layers": 3},
    "gemma3_text": {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]},
    "phi3": {"pad_token_id": 0},
}
CASES = [(family, adapter) for family in FAMILIES for adapter in ("none", "lora", "last_layers")]


def config_of(model: Path, *overrides: str) -> Config:
    command = ["+exp=debug", "model=hub", f"model.name_or_path={model}", "batch.sequence_length=96", *overrides]
    config = compose_config([*command, "batch.global_batch_size=4"]).config
    settle(config, check_model(config), CPU, lambda text: None)
    return config


def counted(config: Config, num_sequences: int) -> Activations:
    """Of the model as a run loads it, on the CPU."""
    model = load_model(config, World())
    use_lora_kernels(model, config.kernels, sharded=False)
    use_block_kernels(model, config.kernels, torch.device("cuda"))  # all of them, as on a GPU
    model.train()
    shape = num_sequences, config.batch.sequence_length
    inputs = {"input_ids": torch.ones(shape, dtype=torch.int64), "position_ids": torch.arange(shape[1]).expand(shape)}
    return count_activations(model, inputs, Segments.of_rows([[shape[1]]] * shape[0]))


@pytest.mark.parametrize(
    ("family", "adapter"),
    [pytest.param(*case, marks=[] if case[0] == "llama" else pytest.mark.slow) for case in CASES],
)
@pytest.mark.parametrize(("num_sequences", "precision"), [(1, "bf16"), (3, "fp32")])
def test_bytes_foreseen_are_bytes_kept(
    make_model: Callable[..., Path], family: str, adapter: str, num_sequences: int, precision: str
) -> None:
    extra = [f"engine.precision={precision}", *(["adapter.num_layers=1"] if adapter == "last_layers" else [])]
    model = make_model(family, **FAMILIES[family])
    config = config_of(model, f"adapter={adapter}", "memory=keep", "kernels=torch", *extra)
    foreseen, _ = predict_activations(config, check_model(config), num_sequences)
    exact = counted(config, num_sequences)
    assert foreseen.block_input == exact.block_input
    for one, other in zip((*foreseen.blocks, foreseen.around), (*exact.blocks, exact.around), strict=True):
        assert one == pytest.approx(other, rel=0.02)


@pytest.mark.parametrize("recomputed", [1, 2, 3, 4])
def test_bytes_kept_with_blocks_that_recompute(make_model: Callable[..., Path], recomputed: int) -> None:
    model = make_model("llama", num_hidden_layers=4)
    config = config_of(model, "memory=keep")
    foreseen, _ = predict_activations(config, check_model(config), 2)
    again = counted(config_of(model, f"memory.recompute={recomputed / 4}"), 2)
    assert sum(again.blocks) + again.around == pytest.approx(foreseen.kept(recomputed), rel=0.02)
    assert sum(block == again.block_input for block in again.blocks) == recomputed


def test_blocks_that_recompute_are_evenly_spread() -> None:
    assert chosen_blocks(0, 4) == [False] * 4
    assert chosen_blocks(2, 4) == [False, True, False, True]
    assert chosen_blocks(3, 4) == [False, True, True, True]
    assert [sum(chosen_blocks(number, 7)) for number in range(8)] == list(range(8))


def test_a_model_whose_blocks_recompute_all_or_none_is_not_asked_for_some() -> None:
    class Old(torch.nn.Module):
        supports_gradient_checkpointing = False

        def __init__(self) -> None:
            super().__init__()
            self.blocks = torch.nn.ModuleList(torch.nn.Linear(2, 2) for _ in range(4))

        def gradient_checkpointing_enable(self, settings: dict[str, Any]) -> None:
            pass

    assert possible_numbers(Old()) == [0]
    Old.supports_gradient_checkpointing = True
    assert possible_numbers(Old()) == [0, 4]
    recompute_blocks(Old(), 1.0)
    with pytest.raises(ModelError, match="the blocks of Old recompute all or none"):
        recompute_blocks(Old(), 0.5)
