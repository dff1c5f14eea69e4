"""What the setting `kernels` comes to on a machine without a GPU."""

import pytest
import torch

from tunesmith.train.config.compose import compose_config
from tunesmith.train.config.config import Kernels
from tunesmith.train.errors import ConfigError
from tunesmith.train.model.kernel_choice import choose_kernels

CPU = torch.device("cpu")


def config(kernels: str):
    return compose_config(["+exp=debug", f"kernels={kernels}"]).config


@pytest.mark.parametrize(("asked", "found"), [("auto", Kernels.torch), ("torch", Kernels.torch), ("off", Kernels.off)])
def test_a_cpu_gets_plain_torch_or_none(asked, found):
    assert choose_kernels(config(asked), CPU) is found


def test_triton_without_a_gpu_is_refused_with_a_remedy():
    with pytest.raises(ConfigError, match="kernels=triton, but there is no GPU") as caught:
        choose_kernels(config("triton"), CPU)
    assert caught.value.do == "set kernels=auto, or torch, which runs anywhere."


def test_the_interpreter_takes_the_place_of_a_gpu(monkeypatch):
    monkeypatch.setattr("tunesmith.kernels.device.INTERPRETED", True)
    assert choose_kernels(config("triton"), CPU) is Kernels.triton
    assert choose_kernels(config("auto"), CPU) is Kernels.torch  # it is for tests: slower than plain torch
