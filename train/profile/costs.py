"""Floating-point operations and bytes of an operation, from the shapes and dtypes that it was called with.

Each operand counts once, as if caches were large. What is not known is 0, as of gathers. A Triton kernel has no shapes;
what ours do follows from those of the autograd function that launched them.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from tunesmith.train.profile.trace import Op, Work

ITEM_BYTES = {
    **dict.fromkeys(("double", "long int", "long"), 8),
    **dict.fromkeys(("float", "int", "TensorList"), 4),  # a list has no dtype in a trace: mostly the optimizer's, fp32
    **dict.fromkeys(("c10::BFloat16", "c10::Half"), 2),
    **dict.fromkeys(("bool", "unsigned char", "signed char", "c10::Float8_e4m3fn", "c10::Float8_e5m2"), 1),
}
PRODUCTS = {  # which operands are multiplied
    **dict.fromkeys(("aten::mm", "aten::bmm", "aten::_scaled_mm"), (0, 1)),
    **dict.fromkeys(("aten::addmm", "aten::addmm_", "aten::baddbmm", "aten::baddbmm_"), (1, 2)),
}
# Attention: where its query is among the arguments, and where is_causal.
FORWARD = {
    "aten::_scaled_dot_product_flash_attention": (0, 4),
    "aten::_scaled_dot_product_flash_attention_for_cpu": (0, 4),
    "aten::_scaled_dot_product_efficient_attention": (0, 6),
    "aten::_scaled_dot_product_cudnn_attention": (0, 6),
}
BACKWARD = {
    "aten::_scaled_dot_product_flash_attention_backward": (1, 11),
    "aten::_scaled_dot_product_flash_attention_for_cpu_backward": (1, 7),
    "aten::_scaled_dot_product_efficient_attention_backward": (1, 11),
    "aten::_scaled_dot_product_cudnn_attention_backward": (1, 14),
}
SEGMENTS = {"aten::_flash_attention_forward": 0, "aten::_flash_attention_backward": 1}  # [T, H, K]: where its query is
BACKWARD_PRODUCTS = 2.5  # five products instead of two: the scores again, dP, dV, dQ, dK
POINTWISE = re.compile(
    r"aten::_?(mul|add|sub|rsub|div|neg|abs|pow|sqrt|rsqrt|exp|log|silu|gelu|relu|sigmoid|tanh|where|softmax|cos|sin|"
    r"maximum|minimum|clamp|native_dropout|masked_fill|addcmul|addcdiv|lerp|silu_backward|gelu_backward|"
    r"softmax_backward_data|native_dropout_backward)_?$"
)
REDUCTIONS = re.compile(r"aten::(sum|mean|amax|amin|linalg_vector_norm|logsumexp|all|any)$")
FOREACH = re.compile(r"aten::_(foreach|fused)_\w+$")


@dataclass(frozen=True)
class Known:
    """What no shape says."""

    pairs: float = 0.0  # tokens that see a token, in all, of one forward: what a head of packed attention weighs
    trains_head: bool = False  # whether the loss also makes the gradient of the output head
    adapted: dict[int | None, Op] = field(
        default_factory=dict
    )  # forwards of LoRA layers, by autograd's sequence number


def asked_for(work: Work) -> Op | None:
    """The operation that some work is of: a kernel of attention may be launched by one with less to tell inside it."""
    op = above = work.op
    if op is not None and op.name != work.name:
        while above is not None and above.name not in FORWARD and above.name not in BACKWARD:
            above = above.parent
    return above or op


def cost(op: Op, work: str, known: Known) -> tuple[float, float]:
    """FLOPs, and bytes read or written, of an operation. work: the name of the kernel, or of the operation itself."""
    try:
        if op.name == "_LinearCrossEntropy":  # other back ends than this one multiply by aten
            return _loss(op, known) if work.startswith("lce_gemm") else (0.0, 0.0)
        if op.name == "LoraLinear":
            return _lora(op)
        if op.name == "LoraLinearBackward" and op.sequence in known.adapted:
            flops, num_bytes = _lora(known.adapted[op.sequence])
            return 2 * flops, 2 * num_bytes
        if op.name in SEGMENTS:
            return _segments(op, SEGMENTS[op.name], known)
        if op.name in PRODUCTS:
            return _product(op, *PRODUCTS[op.name])
        if op.name in FORWARD:
            return _attention(op, *FORWARD[op.name], products=1.0, passes=1)
        if op.name in BACKWARD:
            return _attention(op, *BACKWARD[op.name], products=BACKWARD_PRODUCTS, passes=2)
    except (IndexError, TypeError):  # recorded without shapes, or called otherwise
        return 0.0, 0.0
    return _elementwise(op)


def _product(op: Op, left: int, right: int) -> tuple[float, float]:
    """[.., M, K] by [.., K, N]."""
    a, b = op.dims[left], op.dims[right]
    rows = math.prod(a[:-1])
    added = rows * b[-1] if left and op.values[left + 2 : left + 3] != ["0"] else 0  # beta = 0: the operand is not read
    return 2.0 * math.prod(a) * b[-1], _item(op, left) * float(math.prod(a) + math.prod(b) + rows * b[-1] + added)


def _attention(op: Op, query: int, causal: int, *, products: float, passes: int) -> tuple[float, float]:
    """Two products of [S, K] by [K, S'] for each head; half of them where a row sees only what is before it."""
    q, k, v = op.dims[query : query + 3]
    part = 0.5 if op.values[causal] == "True" and q[-2] == k[-2] else 1.0
    flops = 2.0 * math.prod(q[:-1]) * k[-2] * (q[-1] + v[-1]) * part * products
    return flops, passes * _item(op, query) * float(2 * math.prod(q) + math.prod(k) + math.prod(v))


def _segments(op: Op, query: int, known: Known) -> tuple[float, float]:
    """As _attention(), of [T, H, K] whose records do not see each other."""
    q, k, v = op.dims[query : query + 3]
    flops = 2.0 * q[1] * known.pairs * (q[-1] + v[-1]) * (BACKWARD_PRODUCTS if query else 1.0)
    return flops, (2 if query else 1) * _item(op, query) * float(2 * math.prod(q) + math.prod(k) + math.prod(v))


def _lora(op: Op) -> tuple[float, float]:
    """u = x A^T and y = u B^T of each adapter, without the product with the weight: of x, weights, As, Bs, biases."""
    rows, count = math.prod(op.dims[0][:-1]), (len(op.dims) - 1) // 4
    lora_as, lora_bs = op.dims[1 + count : 1 + 2 * count], op.dims[1 + 2 * count : 1 + 3 * count]
    flops = sum(2.0 * rows * math.prod(matrix) for matrix in (*lora_as, *lora_bs))
    outs = sum(lora_b[0] for lora_b in lora_bs)
    return flops, _item(op, 0) * float(math.prod(op.dims[0]) + rows * outs)


def _loss(op: Op, known: Known) -> tuple[float, float]:
    """Logits and the gradient of hidden states, and that of the head: of hidden states, head, bias, labels."""
    (num_ids, width), rows = op.dims[1], op.dims[3][0]
    products = 3 if known.trains_head else 2
    return 2.0 * products * rows * num_ids * width, products * _item(op, 0) * float((rows + num_ids) * width)


def _elementwise(op: Op) -> tuple[float, float]:
    tensors = list(_tensors(op))
    if not tensors:
        return 0.0, 0.0
    largest, read = max(tensors, key=lambda each: each[0]), sum(count * item for count, item in tensors)
    name = op.name
    if POINTWISE.match(name):
        return float(largest[0]), float(read + largest[0] * tensors[0][1])
    if REDUCTIONS.match(name):
        return float(largest[0]), float(read)
    if FOREACH.match(name):
        return float(read / 4), float(2 * read)
    if name == "aten::copy_":
        return 0.0, float(read)
    if name in ("aten::fill_", "aten::zero_"):
        return 0.0, float(tensors[0][0] * tensors[0][1])
    return 0.0, float(2 * read) if name == "aten::cat" else 0.0


def _tensors(op: Op) -> Iterator[tuple[int, int]]:
    """Elements and bytes an element of each tensor among the arguments, those of lists too."""
    for index, dims in enumerate(op.dims):
        item = _item(op, index)
        for shape in dims if dims and isinstance(dims[0], list) else [dims]:
            if item and isinstance(shape, list):
                yield math.prod(shape), item


def _item(op: Op, index: int) -> int:
    return ITEM_BYTES.get(op.types[index], 0) if index < len(op.types) else 0
