"""Weights that are not finite are named while a model is loaded, by every loader and on every rank."""

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tunesmith.train.config.compose import compose_config
from tunesmith.train.errors import ModelError
from tunesmith.train.model.finite import PIECE, check_finite
from tunesmith.train.model.load import load_model, open_model
from tunesmith.train.ranks.distributed import World

UP, NORM = "model.layers.1.mlp.up_proj.weight", "model.norm.weight"


@pytest.fixture
def damaged(make_model: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """damaged({name: value}) is a model whose tensors of these names have it as their last number."""

    def make(values: dict[str, float]) -> Path:
        folder = tmp_path / "model"
        shutil.copytree(make_model("llama", tie_word_embeddings=True), folder)
        weights = load_file(folder / "model.safetensors")
        for name, value in values.items():
            weights[name].view(-1)[-1] = value
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        return folder

    return make


def config_of(folder: Path | str, *overrides: str) -> Any:
    own = [f"model.name_or_path={folder}", "batch.sequence_length=64", *overrides]
    return compose_config(["+exp=debug", "model=hub", *own]).config


def problem_of(rank: Any, folder: str, overrides: list[str]) -> str:
    """On every rank: what is said of a model while it is loaded."""
    try:
        load_model(config_of(folder, *overrides), rank.world)
    except ModelError as error:
        return error.what
    return ""


@pytest.mark.parametrize(("value", "word"), [(math.nan, "NaN"), (math.inf, "inf"), (-math.inf, "inf")])
def test_a_weight_that_is_not_finite_is_named_while_it_is_loaded(
    value: float, word: str, damaged: Callable[..., Path]
) -> None:
    folder = damaged({NORM: value, UP: value})
    with pytest.raises(ModelError) as caught:
        load_model(config_of(folder), World())
    what = f"{UP} [64, 32] of {folder} is not finite: it holds {word} (the first of 2 such weights)."
    assert (caught.value.what, caught.value.at) == (what, "model.name_or_path")
    assert caught.value.do is not None
    assert caught.value.do.startswith("get its files anew")
    with pytest.raises(ModelError, match=rf"up_proj.weight \[64, 32\] of {folder} is not finite"):
        open_model(folder, config_of(folder))


def test_a_number_too_large_for_fp16_is_told_apart_from_a_bad_file(damaged: Callable[..., Path]) -> None:
    folder = damaged({UP: 1e5})
    load_model(config_of(folder), World())
    with pytest.raises(ModelError, match=r"up_proj\.weight.* holds inf") as caught:
        load_model(config_of(folder, "engine.precision=fp16", "engine=zero2"), World())
    assert caught.value.do is not None
    assert caught.value.do.startswith("set engine.precision=bf16 if these numbers are only too large for fp16")


@pytest.mark.parametrize(
    ("dtype", "value", "word"),
    [
        (torch.float8_e4m3fn, math.nan, "NaN"),
        (torch.float8_e5m2, math.nan, "NaN"),
        (torch.float8_e5m2, -math.inf, "inf"),
    ],
)
@pytest.mark.parametrize("place", [0, PIECE, -1])
def test_float8_is_looked_through_a_piece_at_a_time(dtype: torch.dtype, value: float, word: str, place: int) -> None:
    numbers = torch.ones(PIECE + 7).to(dtype)
    module = nn.Module()
    module.register_parameter("weight", nn.Parameter(numbers, requires_grad=False))
    check_finite(module, "stored", World(), torch.device("cpu"))
    numbers[place] = value
    with pytest.raises(ModelError, match=f"of stored is not finite: it holds {word}"):
        check_finite(module, "stored", World(), torch.device("cpu"))


@pytest.mark.parametrize("engine", ["zero1", "zero3"])
def test_every_rank_hears_of_a_number_in_the_last_ones_share(
    engine: str, damaged: Callable[..., Path], ranks: Any
) -> None:
    folder = damaged({UP: math.nan})
    threshold = "engine.deepspeed.zero_optimization.stage3_param_persistence_threshold=0"
    overrides = [f"engine={engine}", "engine.precision=fp32", *([threshold] if engine == "zero3" else [])]
    said = ranks(2).run(problem_of, folder=str(folder), overrides=overrides)
    assert said == [f"{UP} [64, 32] of {folder} is not finite: it holds NaN."] * 2
