"""Every shipped kernel configuration, compiled for A100 and H100: no spill, all of it fits, wgmma where it is meant."""

import itertools
from dataclasses import replace

import pytest
from matrices import covered

from tunesmith.kernels.blocks import block
from tunesmith.kernels.compile_builds import BUILDS, Build
from tunesmith.kernels.compile_report import report, table


def builds(of: str, arch: int) -> list[Build]:
    return [build for build in BUILDS[of]() if build.arch == arch]


@pytest.mark.parametrize(("of", "arch"), covered(itertools.product(BUILDS, (80, 90)), []))
def test_no_configuration_spills_or_outgrows_its_gpu(of, arch, record_property):
    reports = [report(build) for build in builds(of, arch)]
    record_property("configs", len(reports))
    record_property("spills", sum(found.spills for found in reports))
    assert reports
    assert {f"{found.kernel} {found.sizes} {found.label}": found.faults for found in reports if found.faults} == {}


def test_the_hopper_product_is_fed_by_the_copy_engine_into_wgmma():
    products = [build for build in builds("anchored", 90) if "gemm" in build.kernel.fn.__name__]
    assert products
    assert all({"HGMMA", "UTMALDG"} <= set(build.expects) for build in products)


def test_a_spill_and_a_missing_instruction_are_seen():
    build = next(build for build in builds("chunked", 80) if build.label == "plain")
    swollen = replace(build, block=block(4, 2, BLOCK_V=16384), expects=("HGMMA",))
    found = report(swollen)
    assert found.spills > 0
    assert found.faults == (f"{found.spills} spills", "no HGMMA")
    assert f"| {found.spills} |" in table([found])


def test_too_much_shared_memory_is_seen():
    build = next(build for build in builds("anchored", 80) if build.label == "train")
    found = report(replace(build, block=block(8, 8, BLOCK_C=128, BLOCK_V=256, BLOCK_D=32)))
    assert found.faults == (f"{found.shared} bytes of shared memory, 166912 at most",)


@pytest.mark.parametrize(
    ("of", "size"), covered(itertools.product(("anchored", "chunked"), "CVD"), [("anchored", "D"), ("chunked", "C")])
)
def test_a_size_of_one_compiles(of, size):
    """Triton makes a constant of an argument that is 1, and a constant lacks what a number has."""
    rich = {build.kernel.fn.__name__: build for build in builds(of, 90) if "all options" in build.label}
    for build in rich.values():
        if size in build.kernel.arg_names and size not in _never_constant(build):
            types = {name: kind for name, kind in build.signature.items() if name != size}
            report(replace(build, signature=types, constants=build.constants | {size: 1}, expects=()))


def _never_constant(build: Build) -> list[str]:
    return [parameter.name for parameter in build.kernel.params if parameter.do_not_specialize]
