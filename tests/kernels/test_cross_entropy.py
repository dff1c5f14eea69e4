"""The loss of each token against its formula in float64."""

import pytest
import torch

from tunesmith.kernels.cross_entropy import token_nll


@pytest.mark.parametrize(
    ("T", "V"), [(0, 5), (1, 1), (3, 7), (5, 128), (2, 1000)]
)  # none, one, odd, a power of two, not one
@pytest.mark.parametrize("scale", [1.0, 30.0])  # at 30 a softmax without its maximum taken out overflows in float32
def test_it_is_logsumexp_minus_the_labels_logit(scale, T, V):
    generator = torch.Generator().manual_seed(T * V)
    logits_TV = (torch.randn(T, V, generator=generator) * scale).requires_grad_()
    labels_T = torch.randint(0, V, (T,), generator=generator)
    wide_TV = logits_TV.detach().double().requires_grad_()
    expected_T = torch.logsumexp(wide_TV, -1) - wide_TV.gather(-1, labels_T[:, None])[:, 0]
    found_T = token_nll(logits_TV, labels_T)
    assert found_T.dtype == torch.float32
    torch.testing.assert_close(found_T.double(), expected_T, rtol=2e-6, atol=2e-6 * scale)
    gradient_TV, expected_gradient_TV = (
        torch.autograd.grad(x.sum(), y)[0] for x, y in ((found_T, logits_TV), (expected_T, wide_TV))
    )
    torch.testing.assert_close(gradient_TV.double(), expected_gradient_TV, rtol=0, atol=1e-6)


def test_the_softmax_of_bfloat16_logits_is_taken_in_float32():
    logits_TV = torch.randn(4, 512, generator=torch.Generator().manual_seed(0)).bfloat16()
    labels_T = torch.arange(4)
    torch.testing.assert_close(token_nll(logits_TV, labels_T), token_nll(logits_TV.float(), labels_T), rtol=0, atol=0)


def test_shapes_that_disagree_are_refused():
    with pytest.raises(ValueError, match=r"logits \(2, 3\) and labels \(3,\) are not"):
        token_nll(torch.zeros(2, 3), torch.zeros(3, dtype=torch.int64))
