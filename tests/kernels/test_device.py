"""Sums of 16-bit products in float32, where torch can add them up in place and where it cannot."""

from unittest.mock import patch

import pytest
import torch

from tunesmith.kernels import device
from tunesmith.kernels.device import add_mm_fp32, addmm_widens_in_place

CPU = torch.device("cpu")


def operands() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    lots = torch.Generator().manual_seed(3)
    a, b = (torch.randn(size, generator=lots).bfloat16() for size in ((37, 50), (50, 24)))
    return a, b, torch.randn(37, 24, generator=lots)


@pytest.mark.parametrize("elements", [1, 24 * 5, 2**24])  # strips of one row, of five and a rest, and all at once
def test_where_torch_refuses_the_product_is_added_in_strips(elements):
    a, b, before = operands()
    assert not addmm_widens_in_place(CPU, torch.bfloat16)  # torch really refuses here
    exact = a.double() @ b.double()
    with patch.object(device, "STRIP_ELEMENTS", elements):
        for start in (False, True):
            total = torch.full_like(before, torch.nan) if start else before.clone()
            add_mm_fp32(total, a, b, start=start)
            right = exact if start else exact + before
            assert float((total - right).norm() / right.norm()) < 2e-7


def test_an_addmm_that_widens_is_found_and_used():
    """As a GPU's does where it takes a float32 matrix; one that rounds it, or keeps what start drops, is not used."""
    real = torch.addmm

    def widening(total, a, b, *, out_dtype, beta, out):
        return real(total, a.to(out_dtype), b.to(out_dtype), beta=beta, out=out)

    def rounding(total, a, b, *, out_dtype, beta, out):
        return out.copy_(real(total.bfloat16(), a, b, beta=beta))

    found = {}
    for name, addmm in (("widening", widening), ("rounding", rounding)):
        addmm_widens_in_place.cache_clear()
        with patch.object(torch, "addmm", addmm):
            found[name] = addmm_widens_in_place(CPU, torch.bfloat16)
            a, b, before = operands()
            total = before.clone()
            add_mm_fp32(total, a, b, start=False)
        exact = a.double() @ b.double() + before
        assert float((total - exact).norm() / exact.norm()) < 2e-7
    addmm_widens_in_place.cache_clear()
    assert found == {"widening": True, "rounding": False}
