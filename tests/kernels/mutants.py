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
OPTIONS = ("-o", "addopts=--import-mode=importlib")  # a test that is too slow has not caught a fault
PYTEST = str(Path(sys.executable).with_name("pytest"))
LOSS = "lce/test_linear_cross_entropy.py"
RESCUE = "lce/test_rescue.py"
USE = "test_kernels_in_use.py"
LORA = "lora/test_lora_linear.py"
PHILOX = "test_philox.py"
NORM, ROPE, GLU = "rms_norm/test_rms_norm.py", "rope/test_rope.py", "glu/test_glu.py"


@dataclass(frozen=True)
class Mutant:
    name: str
    file: str  # in kernels/
    right: str
    wrong: str
    tests: str  # file under tests/kernels
    chosen: str  # pytest -k


def mutants(file: str, tests: str, chosen: str, *faults: tuple[str, str, str]) -> list[Mutant]:
    """Faults (name, right, wrong) in one file that the same tests must catch."""
    return [Mutant(name, file, right, wrong, tests, chosen) for name, right, wrong in faults]


LOSS_MUTANTS = [
    *mutants(
        "lce/row_math.py",
        LOSS,
        "float64 and chunked-plain-sum",
        ("p and q exchanged", "small / (1 + small), 1 / (1 + small)", "1 / (1 + small), small / (1 + small)"),
    ),
    *mutants(
        "lce/row_math.py",
        LOSS,
        "by_itself and anchored",
        ("log1p as log(1 + x)", "tl.where(u == 1, x, tl.log(u)", "tl.where(u == 0, x, tl.log(u)"),
    ),
    *mutants("lce/row_math.py", LOSS, "cap_on_small and anchored", ("a coefficient of tanh", "(2 / 15 +", "(1 / 15 +")),
    *mutants(
        "lce/chunked.py",
        LOSS,
        "float64 and chunked-plain-sum",
        ("columns past the end are counted", "other = (cols < V) & (cols != own)", "other = cols != own"),
        ("the label is not left out of the sum", "other = (cols < V) & (cols != own)", "other = cols < V"),
        (
            "the gradient is written past the row",
            "tl.store(row + cols, grad, mask=cols < V)",
            "tl.store(row + cols, grad)",
        ),
    ),
    *mutants(
        "lce/chunked.py",
        LOSS,
        "float64 and chunked-7-4-1031",
        ("the running sum is not rescaled", "exps = exps * shrink + tl.sum(e, 1)", "exps = exps + tl.sum(e, 1)"),
        ("a tile without the label is left out", "return whole - (own_tile", "return whole - 1 - (own_tile"),
        ("the label's tile is taken for an inner one", "number + (number >= own_tile)", "number + (number > own_tile)"),
    ),
    *mutants(
        "lce/chunked.py",
        LOSS,
        "float64 and chunked-scale-sum",
        ("scale left out of the gradient", "(grad * slope * scale)", "(grad * slope)"),
    ),
    *mutants(
        "lce/chunked.py",
        LOSS,
        "under_the_interpreter and chunked",
        ("float32 cast removed", "    z = z.to(tl.float32)\n", ""),
    ),
    *mutants(
        "lce/anchored_kernels.py",
        LOSS,
        "float64 and anchored-plain-sum",
        (
            "a strip of the vocabulary short",
            "tiles_C, tiles_V = tl.cdiv(C, BLOCK_C), tl.cdiv(V, BLOCK_V)\n    for",
            "tiles_C, tiles_V = tl.cdiv(C, BLOCK_C), V // BLOCK_V\n    for",
        ),
        (
            "the last columns of hidden left out",
            "for at_D in range(0, D, BLOCK_D)",
            "for at_D in range(0, D - BLOCK_D, BLOCK_D)",
        ),
        (
            "the label counted twice",
            "keep = (cols[None, :] < V) & (cols[None, :] != own[:, None])",
            "keep = cols[None, :] < V",
        ),
    ),
    *mutants(
        "lce/rescue.py",
        RESCUE,
        "right_among_others and half-True",
        ("hopeless rows not rescued", "RESCUE = tl.constexpr(2.0**60)", "RESCUE = tl.constexpr(2.0**120)"),
        (
            "rows that are not lost get the offset of none",
            "powers.to(e.dtype.element_ty), mask=lost[:, None] &",
            "powers.to(e.dtype.element_ty), mask=(rows < C)[:, None] &",
        ),
    ),
    *mutants(
        "lce/rescue.py",
        RESCUE,
        "twice_more and one",
        ("every tile is done again", "if tl.max(lost.to(tl.int32), 0) > 0", "if tl.max(lost.to(tl.int32), 0) >= 0"),
    ),
    *mutants(
        "lce/anchored_kernels.py",
        LOSS,
        "float64 and anchored-cap-sum",
        ("slope of the cap at the label", "        label_factor *= 1 - tanh * tanh\n", ""),
    ),
    *mutants(
        "lce/anchored.py",
        LOSS,
        "float64 and anchored-plain-sum",
        (
            "the label is not put into the head's gradient",
            "        _add_labels(head.grad_unembed, head, out[LABEL_FACTOR], hidden_CD, labels_C, label_C)\n",
            "",
        ),
    ),
    *mutants(
        "lce/over_chunks.py",
        LOSS,
        "float64 and torch-plain-sum",
        ("only the last chunk's head gradient", "        head.is_first = False\n", ""),
    ),
    *mutants(
        "lce/linear_cross_entropy.py",
        LOSS,
        "float64 and torch-plain-sum",
        (
            "upstream gradient ignored",
            "torch.mul(gradient, factor, out=scaled)",
            "torch.mul(gradient, torch.ones_like(factor), out=scaled)",
        ),
        ("masked rows kept", "kept = labels_T != IGNORE_INDEX", "kept = torch.ones_like(labels_T, dtype=torch.bool)"),
        ("weights ignored", "loss_N = rows.nll * weights_N", "loss_N = rows.nll"),
    ),
    *mutants(
        "lce/torch_backend.py",
        LOSS,
        "tiny_and_large and torch and hopeless",
        ("the largest of the others not taken out", "logits_CV.sub_(largest_C[:, None])", "logits_CV.sub_(0)"),
    ),
    *mutants(
        "lce/linear_cross_entropy.py",
        USE,
        "without_autograd",
        ("gradients under no_grad", "(call.wants_gradient and it for", "(it for"),
    ),
    *mutants(
        "lce/over_chunks.py",
        USE,
        "float16 and chunked",
        ("coefficients of float16 as they are", "if dtype != torch.float16 or", "if dtype != torch.bool or"),
    ),
    *mutants(
        "lce/chunked.py",
        USE,
        "cannot_be and chunked",
        ("entropy of a token that cannot be", "e * tl.where(e > 0, below, 0.0)", "e * below"),
    ),
]

LORA_MUTANTS = [
    *mutants(
        "lora/triton_kernels.py",
        LORA,
        "every_gradient and primes and triton",
        (
            "dropout left out of the forward",
            "            x = tl.where(kept, x, 0.0)\n        u =",
            "            x = tl.where(kept, x, x)\n        u =",
        ),
        ("the mask left out of dx", "dx = tl.where(kept, dx, 0.0)", "dx = tl.where(kept, dx, dx)"),
        (
            "the mask left out of dA",
            "x = tl.where(kept, x, 0.0)\n            da",
            "x = tl.where(kept, x, x)\n            da",
        ),
        (
            "dx is written past the row",
            "dx.to(dx_NK.dtype.element_ty), mask=inside)",
            "dx.to(dx_NK.dtype.element_ty), mask=rows[:, None] < N)",
        ),
    ),
    *mutants(
        "lora/lora_linear.py",
        LORA,
        "every_gradient and primes and torch",
        ("dropout's factor left out", "scale = drop.keep_scale if drop else 1.0", "scale = 1.0"),
    ),
    *mutants(
        "lora/triton_backend.py",
        LORA,
        "every_gradient and odd and triton",
        (
            "scaling left out of dB",
            "_ordered_sum(db_parts, db_OR[:, first : first + bucket], scale)",
            "_ordered_sum(db_parts, db_OR[:, first : first + bucket], 1.0)",
        ),
        (
            "scaling left out of du",
            "_ordered_sum(du_parts, du_NR[:, first : first + bucket], scale)",
            "_ordered_sum(du_parts, du_NR[:, first : first + bucket], 1.0)",
        ),
    ),
    *mutants(
        "lora/triton_kernels.py",
        LORA,
        "every_gradient and many and triton",
        ("only the first chunk of rows in dA and dB", "for _ in range(num_parts)", "for _ in range(1)"),
    ),
    *mutants(
        "lora/triton_backend.py",
        LORA,
        "every_gradient and many and triton",
        (
            "a block of rows short",
            "    return _ceil(_ceil(rows, block), chunks) * block",
            "    return max(1, _ceil(rows, block) // chunks) * block - (rows > 2 * block)",
        ),
    ),
    *mutants(
        "lora/triton_kernels.py",
        PHILOX,
        "triton_draws",
        ("all rows alike in Triton", "group + zero, row + zero", "group + zero, zero"),
        ("10 rounds in Triton", "tl.constexpr(7)", "tl.constexpr(10)"),
    ),
    *mutants(
        "philox.py",
        PHILOX,
        "mask_is_philox",
        ("10 rounds in torch", "ROUNDS = 7", "ROUNDS = 10"),
        ("all rows alike in torch", "c2, c3 = group, row,", "c2, c3 = group, row * 0,"),
    ),
    *mutants(
        "lora/triton_backend.py",
        PHILOX,
        "triton_draws",
        ("half of the seed", "_int32(dropout.seed >> 32)", "_int32(0)"),
    ),
    *mutants(
        "lora/triton_kernels.py",
        LORA,
        "gradient and odd and triton",
        ("the bias twice", "y += tl.load(", "y += 2 * tl.load("),
    ),
    *mutants(
        "lora/autograd.py",
        LORA,
        "every_gradient and v-torch",
        ("a member with another's B", "lora_bs[i], scale, biases[i]", "lora_bs[min(i, 1)], scale, biases[i]"),
        ("a member with another's u", "back_end.up(u_NR[:, starts[i] :]", "back_end.up(u_NR[:, starts[0] :]"),
    ),
    *mutants(
        "lora/autograd.py",
        LORA,
        "nobody_uses and torch",
        ("an unused member has a gradient", "du_NR[:, start:end] = 0", "du_NR[:, start:end] = 1"),
    ),
    *mutants(
        "lora/triton_kernels.py",
        LORA,
        "every_gradient and odd and triton",
        ("padded ranks are written", "inside = (row < rows) & (column < columns)", "inside = row < rows"),
        ("u rounded", "u.to(u_NR.dtype.element_ty)", "u.to(tl.float16).to(u_NR.dtype.element_ty)"),
    ),
    *mutants(
        "lora/triton_backend.py",
        LORA,
        "every_gradient and slices and triton",
        ("later slices of ranks replace the first", "ADD=first > 0", "ADD=False"),
    ),
    *mutants(
        "lora/triton_kernels.py",
        LORA,
        "16_bits and bfloat16 and triton",
        ("float32 cast of dy removed", "            dy = dy.to(tl.float32)\n", "            dy = dy.to(dy.dtype)\n"),
    ),
    *mutants(
        "lora/lora_linear.py",
        LORA,
        "doras_norm",
        (
            "DoRA's norm without the cross term",
            "2 * scaling * mm_fp32(weight_OK, lora_a.t()) + scaling**2",
            "scaling**2",
        ),
    ),
    *mutants(
        "lora/lora_linear.py",
        LORA,
        "dora_is_right and torch",
        ("DoRA forgets what was dropped", "rest = x - dropped", "rest = x"),
    ),
]

LEAF_MUTANTS = [
    *mutants(
        "rms_norm/triton_backend.py",
        NORM,
        "tiny_and_large and triton",
        ("eps left out", "rstd = tl.rsqrt(tl.sum(x * x, 1) / D + eps)", "rstd = tl.rsqrt(tl.sum(x * x, 1) / D)"),
    ),
    *mutants(
        "rms_norm/triton_backend.py",
        NORM,
        "float64s and primes and True-triton",
        ("the mean over the tile", "tl.sum(x * x, 1) / D + eps", "tl.sum(x * x, 1) / BLOCK_D + eps"),
        ("the norm's own share left out of dx", "dx = (dy - normed * along[:, None])", "dx = dy"),
        ("the norm's own share over the tile", "tl.sum(dy * normed, 1) / D", "tl.sum(dy * normed, 1) / BLOCK_D"),
        ("1 + left out", "        weight += 1\n", "        weight += 0\n"),
        (
            "y is written past the row",
            "y_ND.dtype.element_ty), mask=inside)",
            "y_ND.dtype.element_ty), mask=rows[:, None] < N)",
        ),
    ),
    *mutants(
        "rms_norm/triton_backend.py",
        NORM,
        "float64s and many and triton",
        ("only the first rows of a program", "for start in range(part * chunk, tl", "for start in range(part * 0, tl"),
        ("dweight without the last chunk", "parts.sum(0)", "parts[:-1].sum(0)"),
    ),
    *mutants(
        "rms_norm/triton_backend.py",
        NORM,
        "rounded_where_the and triton",
        ("rounded last", "    if ROUND_FIRST:\n", "    if not ROUND_FIRST:\n"),
    ),
    *mutants(
        "rms_norm/rms_norm.py",
        NORM,
        "any_order and torch",
        ("rows in an order that is not memory's", "order if x.permute(order).is_contiguous() else None", "order"),
    ),
    *mutants(
        "rms_norm/torch_backend.py",
        NORM,
        "float64s and primes and torch",
        ("the row's factor left out of dweight", "torch.mv(scratch_ND.t(), rstd_N)", "scratch_ND.sum(0)"),
    ),
    *mutants(
        "rope/triton_backend.py",
        ROPE,
        "float64s and odd and triton",
        ("the gradient turned the wrong way", "= -sin_high, -sin_low", "= sin_high, sin_low"),
        ("the halves of sin not exchanged in the gradient", "= -sin_high, -sin_low", "= -sin_low, -sin_high"),
        ("the first tile of heads alone", "in range(0, heads, BLOCK_H)", "in range(0, BLOCK_H, BLOCK_H)"),
        ("the angles of the first sequence for all", "cos += b * cos_B + t * cos_T", "cos += t * cos_T"),
        ("sequences of k as far apart as those of q", "k += b * k_B + t * k_T", "k += b * q_B + t * k_T"),
    ),
    *mutants(
        "rope/triton_backend.py",
        ROPE,
        "angles_are_kept and triton",
        ("strides of sin taken for those of cos", "if cos.stride() != sin.stride() or", "if"),
        ("an expanded gradient read as it lies", "x if x.stride(-1) == 1 else x.contiguous()", "x"),
    ),
    *mutants(
        "glu/triton_backend.py",
        GLU,
        "float64s and tile and triton",
        ("the slope left out of dgate", "(p + g * slope)", "p"),
        ("the rest of the cubic's slope", "3 * 0.044715", "2 * 0.044715"),
        ("a row of y as long as a row of up", "y + row * y_stride", "y + row * up_stride"),
        ("columns past the end are written", "(g * p * u).to(y.dtype.element_ty), mask=columns < F)", "g * p * u)"),
    ),
    *mutants(
        "glu/torch_backend.py",
        GLU,
        "float64s and odd and torch",
        ("gate and up exchanged in dgate", "dy_NF.to(wide) * up_NF", "dy_NF.to(wide) * gate_NF"),
    ),
]

MUTANTS = LOSS_MUTANTS + LORA_MUTANTS + LEAF_MUTANTS


def run_tests(mutant: Mutant, planted: bool) -> int:
    """pytest's exit code for the tests of a mutant, in a copy with or without it."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in ("kernels", "tests/kernels", "tests/support"):
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
        choice = [f"tests/kernels/{mutant.tests}", "-k", mutant.chosen]
        done = subprocess.run(
            [PYTEST, "-x", "-q", "-p", "no:cacheprovider", "-p", "no:randomly", *OPTIONS, *choice],
            cwd=copy, env=os.environ | {"PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1"},
            capture_output=True, text=True, timeout=250,
        )  # fmt: skip
    if done.returncode == 1 and " failed" not in done.stdout:
        raise RuntimeError(f"{mutant.name}: pytest broke\n{done.stdout}{done.stderr}")
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
