"""Faults planted in the kernels, one at a time, each of which a test must catch.

    python tests/kernels/mutants.py        # plants all of them, a few seconds each; exit code 1 when one survives

A fault is a line of a kernel with one mistake in it, of the kinds that kernels have had in the field: a mask left out,
a scale dropped, a tile short, a cast removed. It is planted in a copy; the tests named with it must fail there, and
pass without it.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
LOSS = "lce/test_linear_cross_entropy.py"
USE = "test_kernels_in_use.py"
LORA = "lora/test_lora_linear.py"
PHILOX = "test_philox.py"


@dataclass(frozen=True)
class Mutant:
    name: str
    file: str  # in kernels/
    right: str
    wrong: str
    tests: str  # file under tests/kernels
    chosen: str  # pytest -k


LOSS_MUTANTS = [
    Mutant(
        "p and q exchanged",
        "lce/row_math.py",
        "small / (1 + small), 1 / (1 + small)",
        "1 / (1 + small), small / (1 + small)",
        LOSS,
        "float64 and chunked-plain-sum",
    ),
    Mutant(
        "log1p as log(1 + x)",
        "lce/row_math.py",
        "tl.where(u == 1, x, tl.log(u)",
        "tl.where(u == 0, x, tl.log(u)",
        LOSS,
        "by_itself and anchored",
    ),
    Mutant("a coefficient of tanh", "lce/row_math.py", "(2 / 15 +", "(1 / 15 +", LOSS, "cap_on_small and anchored"),
    Mutant(
        "columns past the end are counted",
        "lce/chunked.py",
        "other = inside & (cols != own)",
        "other = cols != own",
        LOSS,
        "float64 and chunked-plain-sum",
    ),
    Mutant(
        "the label is not left out of the sum",
        "lce/chunked.py",
        "other = inside & (cols != own)",
        "other = inside",
        LOSS,
        "float64 and chunked-plain-sum",
    ),
    Mutant(
        "scale left out of the gradient",
        "lce/chunked.py",
        "label_factor, grad) * slope * scale",
        "label_factor, grad) * slope",
        LOSS,
        "float64 and chunked-scale-sum",
    ),
    Mutant(
        "the running sum is not rescaled",
        "lce/chunked.py",
        "exps = exps * shrink + e",
        "exps = exps + e",
        LOSS,
        "float64 and chunked-plain-sum",
    ),
    Mutant(
        "float32 cast removed",
        "lce/chunked.py",
        "other=0.0).to(tl.float32)\n    if HAS_BIAS",
        "other=0.0)\n    if HAS_BIAS",
        LOSS,
        "under_the_interpreter and chunked",
    ),
    Mutant(
        "a strip of the vocabulary short",
        "lce/anchored_kernels.py",
        "tiles_C, tiles_V = tl.cdiv(C, BLOCK_C), tl.cdiv(V, BLOCK_V)\n    for",
        "tiles_C, tiles_V = tl.cdiv(C, BLOCK_C), V // BLOCK_V\n    for",
        LOSS,
        "float64 and anchored-plain-sum",
    ),
    Mutant(
        "the last columns of hidden left out",
        "lce/anchored_kernels.py",
        "for at_D in range(0, D, BLOCK_D)",
        "for at_D in range(0, D - BLOCK_D, BLOCK_D)",
        LOSS,
        "float64 and anchored-plain-sum",
    ),
    Mutant(
        "the gradient is written past the row",
        "lce/chunked.py",
        "grad.to(row.dtype.element_ty), mask=cols < V)",
        "grad.to(row.dtype.element_ty))",
        LOSS,
        "float64 and chunked-plain-sum",
    ),
    Mutant(
        "the label counted twice",
        "lce/anchored_kernels.py",
        "keep = (cols[None, :] < V) & (cols[None, :] != own[:, None])",
        "keep = cols[None, :] < V",
        LOSS,
        "float64 and anchored-plain-sum",
    ),
    Mutant(
        "hopeless rows not rescued",
        "lce/anchored_kernels.py",
        "RESCUE = tl.constexpr(2.0**60)",
        "RESCUE = tl.constexpr(2.0**120)",
        LOSS,
        "tiny_and_large and anchored and hopeless",
    ),
    Mutant(
        "slope of the cap at the label",
        "lce/anchored_kernels.py",
        "        label_factor *= 1 - tanh * tanh\n",
        "",
        LOSS,
        "float64 and anchored-cap-sum",
    ),
    Mutant(
        "the label is not put into the head's gradient",
        "lce/anchored.py",
        "        _add_labels(head.grad_unembed, head, out[LABEL_FACTOR], hidden_CD, labels_C, label_C)\n",
        "",
        LOSS,
        "float64 and anchored-plain-sum",
    ),
    Mutant(
        "only the last chunk's head gradient",
        "lce/over_chunks.py",
        "        head.is_first = False\n",
        "",
        LOSS,
        "float64 and torch-plain-sum",
    ),
    Mutant(
        "upstream gradient ignored",
        "lce/linear_cross_entropy.py",
        "torch.mul(gradient, factor.to(",
        "torch.mul(gradient, torch.ones_like(factor).to(",
        LOSS,
        "float64 and torch-plain-sum",
    ),
    Mutant(
        "masked rows kept",
        "lce/linear_cross_entropy.py",
        "kept = labels_T != IGNORE_INDEX",
        "kept = torch.ones_like(labels_T, dtype=torch.bool)",
        LOSS,
        "float64 and torch-plain-sum",
    ),
    Mutant(
        "weights ignored",
        "lce/linear_cross_entropy.py",
        "loss_N = rows.nll * weights_N",
        "loss_N = rows.nll",
        LOSS,
        "float64 and torch-plain-sum",
    ),
    Mutant(
        "the largest of the others not taken out",
        "lce/torch_backend.py",
        "logits_CV.sub_(largest_C[:, None])",
        "logits_CV.sub_(0)",
        LOSS,
        "tiny_and_large and torch and hopeless",
    ),
    Mutant(
        "gradients under no_grad",
        "lce/linear_cross_entropy.py",
        "(call.wants_gradient and it for",
        "(it for",
        USE,
        "without_autograd",
    ),
    Mutant(
        "coefficients of float16 as they are",
        "lce/over_chunks.py",
        "if dtype != torch.float16 or",
        "if dtype != torch.bool or",
        USE,
        "float16 and chunked",
    ),
    Mutant(
        "entropy of a token that cannot be",
        "lce/chunked.py",
        "e * tl.where(e > 0, z - higher, 0.0)",
        "e * (z - higher)",
        USE,
        "cannot_be and chunked",
    ),
]


LORA_MUTANTS = [
    Mutant(
        "dropout left out of the forward",
        "lora/triton_kernels.py",
        "            x = tl.where(kept, x, 0.0)\n        u =",
        "            x = tl.where(kept, x, x)\n        u =",
        LORA,
        "every_gradient and primes and triton",
    ),
    Mutant(
        "the mask left out of dx",
        "lora/triton_kernels.py",
        "dx = tl.where(kept, dx, 0.0)",
        "dx = tl.where(kept, dx, dx)",
        LORA,
        "every_gradient and primes and triton",
    ),
    Mutant(
        "the mask left out of dA",
        "lora/triton_kernels.py",
        "x = tl.where(kept, x, 0.0)\n            da",
        "x = tl.where(kept, x, x)\n            da",
        LORA,
        "every_gradient and primes and triton",
    ),
    Mutant(
        "dropout's factor left out",
        "lora/lora_linear.py",
        "scale = drop.keep_scale if drop else 1.0",
        "scale = 1.0",
        LORA,
        "every_gradient and primes and torch",
    ),
    Mutant(
        "scaling left out of dB",
        "lora/triton_backend.py",
        "_ordered_sum(db_parts, db_OR[:, first : first + bucket], scale)",
        "_ordered_sum(db_parts, db_OR[:, first : first + bucket], 1.0)",
        LORA,
        "every_gradient and odd and triton",
    ),
    Mutant(
        "scaling left out of du",
        "lora/triton_backend.py",
        "_ordered_sum(du_parts, du_NR[:, first : first + bucket], scale)",
        "_ordered_sum(du_parts, du_NR[:, first : first + bucket], 1.0)",
        LORA,
        "every_gradient and odd and triton",
    ),
    Mutant(
        "only the first chunk of rows in dA and dB",
        "lora/triton_kernels.py",
        "for _ in range(num_parts)",
        "for _ in range(1)",
        LORA,
        "every_gradient and many and triton",
    ),
    Mutant(
        "a block of rows short",
        "lora/triton_backend.py",
        "    return _ceil(_ceil(rows, block), chunks) * block",
        "    return max(1, _ceil(rows, block) // chunks) * block - (rows > 2 * block)",
        LORA,
        "every_gradient and many and triton",
    ),
    Mutant(
        "all rows alike in Triton",
        "lora/triton_kernels.py",
        "group + zero, row + zero",
        "group + zero, zero",
        PHILOX,
        "triton_draws",
    ),
    Mutant(
        "10 rounds in Triton", "lora/triton_kernels.py", "tl.constexpr(7)", "tl.constexpr(10)", PHILOX, "triton_draws"
    ),
    Mutant("10 rounds in torch", "philox.py", "ROUNDS = 7", "ROUNDS = 10", PHILOX, "mask_is_philox"),
    Mutant(
        "half of the seed", "lora/triton_backend.py", "_int32(dropout.seed >> 32)", "_int32(0)", PHILOX, "triton_draws"
    ),
    Mutant(
        "all rows alike in torch",
        "philox.py",
        "c2, c3 = group, row,",
        "c2, c3 = group, row * 0,",
        PHILOX,
        "mask_is_philox",
    ),
    Mutant(
        "the bias twice",
        "lora/triton_kernels.py",
        "y += tl.load(",
        "y += 2 * tl.load(",
        LORA,
        "gradient and odd and triton",
    ),
    Mutant(
        "a member with another's B",
        "lora/autograd.py",
        "lora_bs[i], scale, biases[i]",
        "lora_bs[min(i, 1)], scale, biases[i]",
        LORA,
        "every_gradient and v-torch",
    ),
    Mutant(
        "a member with another's u",
        "lora/autograd.py",
        "back_end.up(u_NR[:, starts[i] :]",
        "back_end.up(u_NR[:, starts[0] :]",
        LORA,
        "every_gradient and v-torch",
    ),
    Mutant(
        "an unused member has a gradient",
        "lora/autograd.py",
        "du_NR[:, start:end] = 0",
        "du_NR[:, start:end] = 1",
        LORA,
        "nobody_uses and torch",
    ),
    Mutant(
        "dx is written past the row",
        "lora/triton_kernels.py",
        "dx.to(dx_NK.dtype.element_ty), mask=inside)",
        "dx.to(dx_NK.dtype.element_ty), mask=rows[:, None] < N)",
        LORA,
        "every_gradient and primes and triton",
    ),
    Mutant(
        "padded ranks are written",
        "lora/triton_kernels.py",
        "inside = (row < rows) & (column < columns)",
        "inside = row < rows",
        LORA,
        "every_gradient and odd and triton",
    ),
    Mutant(
        "later slices of ranks replace the first",
        "lora/triton_backend.py",
        "ADD=first > 0",
        "ADD=False",
        LORA,
        "every_gradient and slices and triton",
    ),
    Mutant(
        "u rounded",
        "lora/triton_kernels.py",
        "u.to(u_NR.dtype.element_ty)",
        "u.to(tl.float16).to(u_NR.dtype.element_ty)",
        LORA,
        "every_gradient and odd and triton",
    ),
    Mutant(
        "float32 cast of dy removed",
        "lora/triton_kernels.py",
        "            dy = dy.to(tl.float32)\n",
        "            dy = dy.to(dy.dtype)\n",
        LORA,
        "16_bits and bfloat16 and triton",
    ),
    Mutant(
        "DoRA's norm without the cross term",
        "lora/lora_linear.py",
        "2 * scaling * mm_fp32(weight_OK, lora_a.t()) + scaling**2",
        "scaling**2",
        LORA,
        "doras_norm",
    ),
    Mutant(
        "DoRA forgets what was dropped",
        "lora/lora_linear.py",
        "rest = x - dropped",
        "rest = x",
        LORA,
        "dora_is_right and torch",
    ),
]

MUTANTS = LOSS_MUTANTS + LORA_MUTANTS


def run_tests(mutant: Mutant, planted: bool) -> int:
    """pytest's exit code for the tests of a mutant, in a copy with or without it."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in ("kernels", "tests/kernels"):
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("pyproject.toml", "tests/conftest.py"):
            shutil.copy(ROOT / name, copy / name)
        (copy / "tunesmith").mkdir()
        (copy / "tunesmith/kernels").symlink_to("../kernels")
        if planted:
            file = copy / "kernels" / mutant.file
            text = file.read_text(encoding="utf-8")
            assert text.count(mutant.right) >= 1, f"{mutant.name}: {mutant.file} has no {mutant.right!r} any more"
            file.write_text(text.replace(mutant.right, mutant.wrong), encoding="utf-8")
        done = subprocess.run(
            ["pytest", "-x", "-q", "-p", "no:cacheprovider", f"tests/kernels/{mutant.tests}", "-k", mutant.chosen],
            cwd=copy, env=os.environ | {"PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1"},
            capture_output=True, text=True, timeout=250,
        )  # fmt: skip
        return done.returncode


def caught(mutant: Mutant) -> bool:
    """Whether the named tests fail with the fault (exit code 1: failed tests, not a broken file or none chosen)."""
    return run_tests(mutant, planted=True) == 1


def main() -> int:
    num_caught = 0
    with ThreadPoolExecutor(2) as pool:
        sound = list(pool.map(lambda mutant: run_tests(mutant, planted=False) == 0, _one_for_each_choice()))
        for mutant, found in zip(MUTANTS, pool.map(caught, MUTANTS), strict=True):
            num_caught += found
            sys.stdout.write(f"{'caught' if found else 'SURVIVED'}  {mutant.file}: {mutant.name}\n")
            sys.stdout.flush()
    sys.stdout.write(f"mutants: {num_caught}/{len(MUTANTS)} caught\n")
    return int(num_caught < len(MUTANTS) or not all(sound))


def _one_for_each_choice() -> list[Mutant]:
    """Without a fault, the same tests must pass: one run for each different choice of tests."""
    return list({(mutant.tests, mutant.chosen): mutant for mutant in MUTANTS}.values())


if __name__ == "__main__":
    sys.exit(main())
