"""Every kernel as launches use it, compiled for A100 and H100: no spill, all of it fits, wgmma where it is meant, and
the row kernel in few enough instructions.
"""

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch

from tunesmith.kernels import compile_report
from tunesmith.kernels.compile_builds import CALLS, EVERYTHING, all_builds, builds, dry_lora, dry_loss
from tunesmith.kernels.compile_report import features, loops, report, row_instructions, table
from tunesmith.kernels.dry_launches import Launch, dry_launches


@pytest.mark.slow
@pytest.mark.heavy
@pytest.mark.timeout(900)  # up to 234 builds of half a second
@pytest.mark.parametrize(("of", "arch"), list(itertools.product(CALLS, (80, 90))))
def test_no_launch_spills_or_outgrows_its_gpu(of, arch, record_property):
    reports = [report(build) for build in builds(of, arch)]
    record_property("configs", len(reports))
    record_property("spills", sum(found.spills for found in reports))
    assert reports
    assert {f"{found.kernel} {found.sizes} {found.features}": found.faults for found in reports if found.faults} == {}


@pytest.mark.parametrize(
    ("of", "arch", "kernel", "what"),
    [
        ("chunked", 90, "lce_rows_kernel", "bf16 GRAD"),
        ("chunked", 80, "lce_rows_kernel", "bf16 GRAD, odd V"),
        ("anchored", 90, "lce_gemm_kernel", "bf16 STORE, odd V, odd D"),
        ("anchored", 80, "lce_gemm_kernel", "bf16 STORE, odd D"),
        ("lora", 80, "down", "bf16 DROP, odd K"),
        ("lora", 80, "up", "bf16 BIAS, odd OUT, odd rank_B"),
        ("lora", 90, "grad_down", "bf16 DROP DA DX, odd K"),
    ],
)
def test_what_once_spilled_or_took_too_many_instructions_does_not(of, arch, kernel, what):
    """The last build of its kind: with LoRA the most ranks, else the last candidate of the table."""
    chosen = [build for build in builds(of, arch) if build.kernel.fn.__name__ == kernel and features(build) == what]
    assert report(chosen[-1]).faults == ()


def test_every_kind_of_launch_is_in_the_report():
    """Sizes that Triton can and cannot read in vectors, for each kernel that reads matrices, and both architectures."""
    found = {(build.arch, build.kernel.fn.__name__, "odd" in features(build)) for build in all_builds()}
    kernels = {"lce_rows_kernel", "lce_gemm_kernel", "lce_rescue_kernel", "down", "up", "grad_up", "grad_down"}
    assert found >= set(itertools.product((80, 90), kernels - {"lce_gemm_kernel"}, (False, True)))
    products = {found for found in found if "gemm" in found[1]}
    assert products == {(80, "lce_gemm_kernel", odd) for odd in (False, True)} | {
        (90, "lce_gemm_kernel", True),
        (90, "lce_gemm_tma_kernel", False),
        (90, "lce_gemm_tma_kernel", True),
    }


def _plain(arch: int, of: str, kernel: str) -> Launch:
    return next(build for build in builds(of, arch) if build.kernel.fn.__name__ == kernel)


def _with(build: Launch, num_warps: int, num_stages: int, **sizes: int) -> Launch:
    numbers = {(build.kernel.arg_names.index(name),): size for name, size in sizes.items()}
    return replace(build, constants=build.constants | numbers, num_warps=num_warps, num_stages=num_stages)


def test_a_spill_is_seen():
    found = report(_with(_plain(80, "anchored", "lce_gemm_kernel"), 4, 3, BLOCK_C=128, BLOCK_V=256, BLOCK_D=32))
    assert found.spills > 0
    assert f"{found.spills} spills" in found.faults
    assert f"| {found.spills} |" in table([found])


def test_too_much_shared_memory_is_seen():
    build = _with(_plain(80, "anchored", "lce_gemm_kernel"), 8, 8, BLOCK_C=128, BLOCK_V=256, BLOCK_D=32)
    found = report(build)
    assert found.faults == (f"{found.shared} bytes of shared memory, 166912 at most",)


def _code(*bodies: tuple[str, int]) -> str:
    """SASS of loops, each an instruction so often and a branch back."""
    lines: list[str] = []
    for instruction, times in bodies:
        lines += [*[instruction] * times, f"@!P0 BRA {16 * len(lines):#x}"]
    lines += [f"@P1 BRA {16 * len(lines) + 16:#x}", "EXIT"]
    return "\n".join(f"        /*{16 * at:04x}*/    {text} ;    /* 0x0 */" for at, text in enumerate(lines))


def test_instructions_are_counted_in_the_inner_loop_of_each_pass():
    build = _plain(90, "chunked", "lce_rows_kernel")
    code = _code(
        ("LDG.E.128 R4, [R2.64]", 20), ("LDG R4, [R2.64]", 40), ("STG [R2.64], R4", 9), ("STG [R2.64], R5", 27)
    )
    assert [len(body) for body in loops(code)] == [21, 41, 10, 28]
    assert row_instructions(build, code) == (21 + 10) / 16  # 4,096 columns by 256 threads: 16 an iteration


def test_too_many_instructions_an_element_are_seen():
    with patch.object(compile_report, "ROW_INSTRUCTIONS", 10):
        found = report(_plain(90, "chunked", "lce_rows_kernel"))
    assert found.faults == (f"{found.an_element:.1f} instructions an element, 10 at most",)


@pytest.mark.parametrize(
    "call",
    [
        pytest.param(lambda: dry_loss("chunked", 64, 1, torch.bfloat16, EVERYTHING), id="V chunked"),
        *(
            pytest.param(call, id=name, marks=pytest.mark.slow)
            for name, call in {
                "V anchored": lambda: dry_loss("anchored", 64, 1, torch.bfloat16, EVERYTHING),
                "D anchored": lambda: dry_loss("anchored", 1, 1000, torch.bfloat16, EVERYTHING),
                "K and O": lambda: dry_lora(1, 1, 16, dropout_p=0.1, bias=True),
            }.items()
        ),
    ],
)
def test_a_size_of_one_compiles(call: Callable[[], Any]):
    """Triton makes a constant of an argument that is 1, and a constant lacks what a number has."""
    with dry_launches(90) as launches:
        call()
    assert any("=1" in features(launch) for launch in launches)
    for launch in {launch.key: launch for launch in launches}.values():
        report(launch)
