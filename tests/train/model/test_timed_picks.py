"""Which calls of kernels a run makes, and that all ranks use one pick of their blocks (kernels/timed_pick.py)."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from tunesmith.kernels.lce import backends
from tunesmith.kernels.timed_pick import forget_picks
from tunesmith.train.config.compose import compose_config
from tunesmith.train.errors import TrainingError
from tunesmith.train.model.load import quiet_transformers
from tunesmith.train.model.timed_picks import use_timed_picks, workloads_of

CPU = torch.device("cpu")
SETTINGS = ["+exp=debug", "batch.micro_batch_size=2", "batch.sequence_length=128"]


def adapted(folder: str, **lora: Any) -> Any:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    settings = {"r": 4, "lora_dropout": 0.1, "target_modules": "all-linear"} | lora
    with quiet_transformers():
        return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings))


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("engine", ["zero2", "zero3"])
def test_each_kind_of_layer_is_timed_once_as_it_will_be_called(engine, dora, make_model):
    config = compose_config([*SETTINGS, f"engine={engine}"]).config
    found = [workload.name for workload in workloads_of(adapted(str(make_model("llama")), use_dora=dora), config, CPU)]
    assert found[0] == "loss, frozen head, torch.float32, T=256 D=32 V=2048"
    sizes = sorted(name.partition("N=256 ")[2] for name in found[1:])
    if engine == "zero2" and not dora:  # q, k and v together, o, gate and up together, down
        assert sizes == [
            "K=32 OxR=32x4 16x4 16x4 dropout", "K=32 OxR=32x4 dropout", "K=32 OxR=64x4 64x4 dropout",
            "K=64 OxR=32x4 dropout",
        ]  # fmt: skip
    else:  # each alone: q and o are alike, k and v, gate and up
        assert sizes == [
            "K=32 OxR=16x4 dropout", "K=32 OxR=32x4 dropout", "K=32 OxR=64x4 dropout", "K=64 OxR=32x4 dropout",
        ]  # fmt: skip


def test_a_trained_head_is_timed_with_its_gradient(make_model):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(make_model("llama"), dtype=torch.bfloat16)
    (loss,) = workloads_of(model, compose_config(SETTINGS).config, CPU)
    assert loss.name == "loss, trained head, torch.bfloat16, T=256 D=32 V=2048"


def picked_on_ranks(rank: Any, folder: str, cache: str, lora: bool) -> dict[str, Any]:
    from transformers import AutoModelForCausalLM

    os.environ["XDG_CACHE_HOME"] = cache if rank.world.rank == 0 else "/nowhere/rank 0 alone picks"
    model = adapted(folder) if lora else AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = compose_config(SETTINGS).config
    try:
        use_timed_picks(model, config, rank.world, rank.device, lambda text: None)
    except TrainingError as error:
        return {"error": str(error)}
    found = {str(head): backend for head, backend in backends.picked.items()}
    forget_picks()
    return found


def test_rank_0_picks_and_every_rank_uses_it(make_model, ranks, tmp_path):
    """Here, without Triton, both back ends of the loss come to torch: which one is the faster is chance, and one."""
    first, second = ranks(2).run(picked_on_ranks, folder=str(make_model("llama")), cache=str(tmp_path), lora=False)
    assert first == second
    assert first["(2048, 32)"] in ("anchored", "chunked")
    assert (Path(tmp_path) / "tunesmith/picks.json").is_file()


def test_a_kernel_that_does_not_work_ends_the_run_on_every_rank(make_model, ranks, tmp_path):
    answers = ranks(2).run(picked_on_ranks, folder=str(make_model("llama")), cache=str(tmp_path), lora=True)
    assert "no kernel computes what torch does on this GPU: lora" in answers[0]["error"]
    assert "there is no GPU" in answers[0]["error"]
    assert "rank 0 says why" in answers[1]["error"]
    assert all("do: set kernels=torch." in answer["error"] for answer in answers)
