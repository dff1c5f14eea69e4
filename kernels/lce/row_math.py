"""The formulas of torch_backend.py inside Triton kernels. Everything is float32; see there for the derivation."""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)

# A chunk has any number of rows, and a vector over rows begins anywhere: neither 1 nor a multiple of 16 must compile a
# kernel anew in the middle of a run.
ROWS = ["C"]
ROW_VECTORS = ["own_C", "label_C", "coefficient_C", "offset_C", "e_factor_C", "label_factor_C", "sums", "out"]


@triton.jit
def capped(z, cap):
    """cap * tanh(z / cap) and its slope 1 - tanh^2. The interpreter has no tanh, and tanh.approx has 11 bits."""
    x = z / cap
    square = x * x
    # Below 1/4 the exponential form cancels; the series is exact to 2e-8 there.
    near = x * (1 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835)))))
    tiny = tl.exp2(tl.abs(x) * (-2 * LOG2E))  # the tensor first: the interpreter's constants do not take one
    far = (1 - tiny) / (1 + tiny)
    tanh = tl.where(tl.abs(x) < 0.25, near, tl.where(x < 0, -far, far))
    return cap * tanh, 1 - tanh * tanh


@triton.jit
def log1p(x):
    """log(1 + x) for x of 0 and more, exact for small x too (Kahan): the error of 1 + x is undone by the quotient."""
    u = 1 + x
    return tl.where(u == 1, x, tl.log(u) * (x / tl.where(u == 1, 1.0, u - 1)))


@triton.jit
def from_margin(margin):
    """nll = log(1 + exp(margin)), p = 1 / (1 + exp(margin)) and q = 1 - p, none of which cancels or overflows."""
    small = tl.exp(-tl.abs(margin))
    nll = tl.maximum(margin, 0.0) + log1p(small)
    less, more = small / (1 + small), 1 / (1 + small)
    return nll, tl.where(margin >= 0, less, more), tl.where(margin >= 0, more, less)


@triton.jit
def entropy_of(nll, p, q, others_entropy):
    """p * nll + q * (nll of the others together + their entropy); -log(q) by log1p where p is small."""
    small = tl.minimum(p, 0.5)
    others_nll = tl.where(p < 0.5, log1p(small / (1 - small)), -tl.log(tl.where(q > 0, q, 1.0)))
    return p * nll + q * (others_nll + others_entropy)
