"""What kind of work an operation or kernel is, by its name and by what it was called by."""

import re
from enum import StrEnum

from tunesmith.train.profile.trace import Kind, Work
from tunesmith.train.ranks.phases import Phase


class Category(StrEnum):
    gemm = "GEMM"
    attention = "attention"
    elementwise = "norm, elementwise"
    loss = "loss"
    lora = "LoRA"
    optimizer = "optimizer"
    communication = "communication"
    copies = "copies"


LOSS = re.compile("LinearCrossEntropy|cross_entropy|nll_loss|log_softmax|LogSoftmax|NllLoss|^lce_")
LORA = re.compile("LoraLinear")
ATTENTION = re.compile(
    "scaled_dot_product|ScaledDotProduct|[Ff]lash|fmha|flex_attention|varlen|aten::_?softmax|Attention"
)
GEMM = re.compile(r"aten::(mm|addmm_?|bmm|baddbmm_?|addmv_?|mv|dot|_scaled_mm|_grouped_mm)$|gemm|cutlass|cublas|nvjet")
COPIES = re.compile("aten::(copy_|_to_copy|clone|contiguous|fill_|zero_|cat|stack|_foreach_copy_)$|[Mm]emcpy|[Mm]emset")


def category_of(work: Work) -> Category:
    names = [work.name, *(work.op.chain() if work.op else ())]
    own = names[1] if len(names) > 1 else work.name  # the operation, where work is a kernel
    if work.kind is Kind.communication:
        return Category.communication
    if work.kind is Kind.copy:
        return Category.copies
    if work.phase == Phase.update:
        return Category.optimizer
    if any(map(LOSS.search, names)):
        return Category.loss
    if any(map(LORA.search, names)):  # whose one addmm_ is the product with the weight that is adapted
        return Category.gemm if own == "aten::addmm_" else Category.lora
    if any(map(ATTENTION.search, names)):
        return Category.attention
    if GEMM.search(own) or GEMM.search(work.name):
        return Category.gemm
    return Category.copies if COPIES.search(own) or COPIES.search(work.name) else Category.elementwise
