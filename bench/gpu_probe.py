"""What decides the design of our kernels, measured on one GPU: research/kernels.md section 8, items 1 to 5.

    python bench/gpu_probe.py                       about a minute on an H200; docs/gpu.md says how on a lent one
    python bench/gpu_probe.py --device cpu --tiny   shows that it works, and measures nothing

0  the two ceilings: a copy between large buffers, and a square bfloat16 product by cuBLAS
1  cuBLAS at the products of the loss, [C, D] x [D, V] and [C, V] x [V, D]: chunks in whole waves against powers of two
2  the row kernel of the chunked back end, per block: bytes a second, counting one read and one write of the logits
3  the product of the anchored back end, per block, with and without its store, over cuBLAS at the same shape (eta)
4  addmm onto a given matrix against a plain product: whether reading it is hidden
5  the passes of LoRA, with and without dropout: bytes a second, counting what each must read and write
Kernels are held against float64 or the plain-torch back end first. Items 2, 3 and 5 need Triton: a GPU, or with --tiny
TRITON_INTERPRET=1.
"""

from collections.abc import Callable, Iterator
from functools import partial
from types import ModuleType
from typing import Any

import torch
from gpu_measuring import Budget, arguments, error, finish, first_line, table, take_turns

from tunesmith.kernels.blocks import Block, block
from tunesmith.kernels.device import arch, mm_fp32, num_multiprocessors, why_not_triton
from tunesmith.kernels.lce.backends import wave_rows
from tunesmith.kernels.lce.head import make_head
from tunesmith.kernels.lora import torch_backend
from tunesmith.kernels.philox import dropout

HEADS = {"1B": (2048, 128256), "7B": (3584, 152064), "8B": (4096, 128256)}
TINY_HEADS = {"1B": (16, 512)}
LORA = {
    "8B qkv": (4096, 6144, 16),
    "8B gate_up": (4096, 28672, 16),
    "8B down": (14336, 4096, 16),
    "8B qkv 64": (4096, 6144, 64),
}
TINY_LORA = {"tiny": (32, 48, 4)}
SLAB_BYTES = 2**29
# Warp-specialised, which no table ships: Triton has given wrong results with it (issue 8311).
SPECIALIZED = [
    block(4, stages, BLOCK_C=128, BLOCK_V=width, BLOCK_D=64, SPECIALIZE=1) for stages, width in ((3, 256), (4, 128))
]

Row = list[object]


class Probe:
    """One run: what is measured, as rows of a table."""

    def __init__(self, device: torch.device, tiny: bool) -> None:
        self.device, self.tiny = device, tiny
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.heads, self.lora = (TINY_HEADS, TINY_LORA) if tiny else (HEADS, LORA)
        self.rounds, self.rows, self.chunk = (1, 32, 8) if tiny else (20, 8192, 1024)
        self.drawn = torch.Generator(device).manual_seed(3)

    def tensor(self, *shape: int, scale: float = 1.0) -> torch.Tensor:
        return torch.randn(shape, generator=self.drawn, device=self.device, dtype=self.dtype).mul_(scale)

    def times(self, calls: dict[str, Callable[[], object]]) -> dict[str, float]:
        """Milliseconds, taking turns."""
        turned = {name: (lambda turn, call=call: call()) for name, call in calls.items()}
        return {name: found["ms"] for name, found in take_turns(turned, self.device, rounds=self.rounds).items()}

    def ceilings(self) -> Iterator[Row]:
        size = 64 if self.tiny else 8192
        a, b, out = self.tensor(size, size), self.tensor(size, size), self.tensor(size, size)
        big = self.tensor(2**10 if self.tiny else 2**31)
        target = torch.empty_like(big)
        ms = self.times({"copy": lambda: target.copy_(big), "product": lambda: torch.mm(a, b, out=out)})
        yield ["0 copy", f"{big.nbytes / 2**30:.3g} GiB", ms["copy"], _rate(2 * big.nbytes, ms["copy"]), "GB/s", ""]
        yield ["0 product", f"{size}^3", ms["product"], _teraflops(2 * size**3, ms["product"]), "TFLOP/s", ""]

    def products(self) -> Iterator[Row]:
        """Item 1."""
        for head, (D, V) in self.heads.items():
            weight = self.tensor(V, D, scale=D**-0.5)
            waves = 32 if self.tiny else wave_rows(SLAB_BYTES // (2 * V), D, num_multiprocessors(self.device), False)
            for rows in (waves, *((16, 64) if self.tiny else (1024, 2048))):
                why = "waves" if rows == waves else "power of two"
                for name, ms in self._two_products(rows, weight).items():
                    yield [f"1 {name}", f"{head} C={rows}", ms, _teraflops(2 * rows * D * V, ms), "TFLOP/s", why]

    def _two_products(self, rows: int, weight: torch.Tensor) -> dict[str, float]:
        hidden = self.tensor(rows, weight.shape[1])
        logits = torch.empty(rows, len(weight), dtype=self.dtype, device=self.device)
        logits.copy_(hidden @ weight.t())
        calls = {"logits": lambda: torch.mm(hidden, weight.t(), out=logits), "hidden": lambda: mm_fp32(logits, weight)}
        return self.times(calls)

    def row_kernel(self) -> Iterator[Row]:
        """Item 2. After the first call it reads its own gradients: the same bytes and as many exps."""
        from tunesmith.kernels.lce import chunked

        for head, (_, V) in self.heads.items():
            logits, labels = self.tensor(self.chunk, V, scale=3.0), self._labels(self.chunk, V)
            exact = logits.double().log_softmax(-1).gather(1, labels[:, None])[:, 0]
            for sizes in chunked.ROW_BLOCKS[arch(self.device)]:
                slab, out = logits.clone(), torch.empty(3, len(logits), dtype=torch.float32, device=self.device)
                call = partial(_launch_rows, slab, labels, torch.ones_like(out[0]), out, sizes)
                call()
                wrong = error(out[chunked.NLL], -exact)
                ms = self.times({"rows": call})["rows"]
                yield ["2 rows", f"{head} {_name(sizes)}", ms, _rate(2 * slab.nbytes, ms), "GB/s", f"error {wrong:.1e}"]

    def anchored_product(self) -> Iterator[Row]:
        """Item 3."""
        from tunesmith.kernels import blocks
        from tunesmith.kernels.lce import anchored

        for name, (D, V) in self.heads.items():
            rows = 16 if self.tiny else wave_rows(SLAB_BYTES // (2 * V), D, num_multiprocessors(self.device), False)
            hidden, weight, labels = self.tensor(rows, D), self.tensor(V, D, scale=3 * D**-0.5), self._labels(rows, V)
            candidates = anchored.GEMM_BLOCKS[arch(self.device)] + (SPECIALIZED if arch(self.device) == 90 else [])
            for sizes in candidates:
                blocks.picked["lce_gemm", (D, V)] = sizes
                for stores in (True, False):
                    what = f"{name} C={rows} {_name(sizes)}{'' if stores else ', no store'}"
                    yield ["3 product", what, *self._one_product(hidden, weight, labels, stores)]
                del blocks.picked["lce_gemm", (D, V)]

    def _one_product(self, hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, stores: bool) -> Row:
        from tunesmith.kernels.lce import anchored

        head = make_head(
            weight, None,
            wants_hidden=stores, wants_unembed=False, wants_bias=False, wants_stats=False,
        )  # fmt: skip
        label_C = anchored.label_logits(head, hidden, labels)
        plain = torch.empty(len(hidden), len(weight), dtype=self.dtype, device=self.device)
        try:
            wrong = _sum_error(anchored.powers(head, hidden, labels, label_C)[1][0], hidden, weight, labels)
        except Exception as problem:  # whatever the compiler or the launch says of a candidate
            return [None, None, "eta", first_line(problem)]
        ms = self.times(
            {
                "ours": lambda: anchored.powers(head, hidden, labels, label_C),
                "cublas": lambda: torch.mm(hidden, weight.t(), out=plain),
            }
        )
        return [ms["ours"], ms["cublas"] / ms["ours"], "eta", f"error {wrong:.1e}"]

    def onto_a_matrix(self) -> Iterator[Row]:
        """Item 4. As often as it is repeated, the sum stays of one size: it is halved each time."""
        for name, (K, outs, _) in self.lora.items():
            x, weight = self.tensor(self.rows, K), self.tensor(outs, K, scale=K**-0.5)
            plain, onto = _plain_and_onto(x, weight)
            ms = self.times({"plain": plain, "onto": onto})
            yield ["4 addmm", name, ms["onto"], ms["onto"] / ms["plain"], "of plain", f"plain {ms['plain']:.3g} ms"]

    def lora_passes(self) -> Iterator[Row]:
        """Item 5: the least bytes of each pass; where partial sums are written too, they count as lost time."""
        for name, (K, outs, rank) in self.lora.items():
            x, a, b = self.tensor(self.rows, K), self.tensor(rank, K, scale=K**-0.5), self.tensor(outs, rank)
            dy, u = self.tensor(self.rows, outs), self.tensor(self.rows, rank)
            for p in (0.0, 0.05):
                drop, du = dropout(p, 5), torch.empty_like(u)
                passes = {
                    "down": (lambda to, drop=drop, x=x, a=a: to.down(x, a, drop), x.nbytes),
                    "grad_down": (
                        lambda to, drop=drop, x=x, a=a, u=u: to.grad_down(x, u, a, drop, wants_x=True)[1],
                        2 * x.nbytes,
                    ),
                    "up": (lambda to, u=u, b=b: to.up(u, b, 1.0, None), dy.nbytes),
                    "grad_up": (
                        lambda to, dy=dy, u=u, b=b, du=du: to.grad_up(dy, u, b, 1.0, du, wants_b=True),
                        dy.nbytes,
                    ),
                }
                for what in ("down", "grad_down") if p else passes:  # the others know no dropout
                    yield [f"5 {what}", f"{name} p={p:g}", *self._one_pass(*passes[what])]

    def _one_pass(self, call: Callable[[ModuleType], Any], moved: int) -> Row:
        from tunesmith.kernels.lora import triton_backend

        wrong = error(call(triton_backend), call(torch_backend).double())
        ms = self.times({"pass": lambda: call(triton_backend)})["pass"]
        return [ms, _rate(moved, ms), "GB/s", f"error {wrong:.1e}"]

    def _labels(self, rows: int, V: int) -> torch.Tensor:
        return torch.randint(0, V, (rows,), generator=self.drawn, device=self.device)


def _launch_rows(
    slab: torch.Tensor, labels: torch.Tensor, factor: torch.Tensor, out: torch.Tensor, sizes: Block
) -> None:
    from tunesmith.kernels.lce import chunked

    rows, V = slab.shape
    chunked.lce_rows_kernel[(rows,)](
        slab, slab.stride(0), None, labels, factor, out, rows, V, 1.0, 1.0, HAS_BIAS=False, HAS_CAP=False,
        STATS=False, GRAD=True, **sizes.launch,
    )  # fmt: skip


def _plain_and_onto(x: torch.Tensor, weight: torch.Tensor) -> tuple[Callable[[], object], Callable[[], object]]:
    out = x @ weight.t()
    plain = lambda: torch.mm(x, weight.t(), out=out)  # noqa: E731
    return plain, lambda: torch.addmm(out, x, weight.t(), beta=0.5, out=out)


def _sum_error(found_C: torch.Tensor, hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> float:
    """Error of log S of the first 64 rows against float64: S is the sum of exp(logit - label's logit - 28)."""
    z = hidden[:64].double() @ weight.double().t()
    own = labels[:64, None]
    distances = (z - z.gather(1, own)).scatter_(1, own, -torch.inf)
    return error(found_C[:64].double().log() + 28, distances.logsumexp(-1))


def _name(sizes: Block) -> str:
    tiles = "x".join(str(value) for name, value in sizes.sizes if name.startswith("BLOCK"))
    return (
        f"{tiles} w{sizes.num_warps} s{sizes.num_stages}{' specialised' if 'SPECIALIZE' in dict(sizes.sizes) else ''}"
    )


def _rate(moved: int, ms: float) -> float:
    return moved / ms / 1e6


def _teraflops(operations: int, ms: float) -> float:
    return operations / ms / 1e9


def main() -> None:
    options = arguments(__doc__, seconds=80)
    budget = Budget(options.seconds)
    probe = Probe(options.device, options.tiny)
    parts: dict[str, Callable[[], Iterator[Row]]] = {
        "0 ceilings": probe.ceilings,
        "1 products": probe.products,
        "4 addmm": probe.onto_a_matrix,
    }
    of_triton = {"3 anchored": probe.anchored_product, "2 rows": probe.row_kernel, "5 lora": probe.lora_passes}
    reason = why_not_triton(options.device)
    if reason is None:  # the interpreter runs them too, which takes a while
        parts |= of_triton
    absent = {} if reason is None else dict.fromkeys(of_triton, reason)
    rows: list[Row] = []
    for _, part in budget.each(parts.items()):
        rows += part()
        if options.device.type == "cuda":
            torch.cuda.empty_cache()
    head = ("item", "shape", "ms", "value", "unit", "")
    summary = table(head, sorted(rows, key=lambda row: str(row[0]).split()[0]))
    summary += "".join(f"\nabsent: {name}: {why}" for name, why in absent.items())
    found = {
        "what": "probe",
        "rows": [dict(zip(("item", "shape", "ms", "value", "unit", "note"), row, strict=True)) for row in rows],
    }
    finish("gpu_probe", options, {**found, "absent": absent}, [], budget, summary)


if __name__ == "__main__":
    main()
