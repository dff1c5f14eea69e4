"""What the compiler makes of every kernel as it is shipped: registers, spills, shared memory, matrix instructions.

No GPU is needed: Triton compiles for a named architecture, and the cuobjdump of its wheel reads the result. Run it in a
process without TRITON_INTERPRET.
"""

import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tunesmith.kernels.compile_builds import BUILDS, Build

SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}  # bytes of one thread block, CUDA C++ programming guide, table 28
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
COUNTED = ("HGMMA", "HMMA", "UTMALDG", "UTMASTG", "LDGSTS")


@dataclass(frozen=True)
class Report:
    """One build, compiled."""

    kernel: str
    arch: int
    sizes: str
    label: str
    registers: int
    stack: int  # bytes
    spills: int  # instructions that store to or load from local memory
    shared: int  # bytes
    counts: dict[str, int]  # of COUNTED
    faults: tuple[str, ...]  # what is wrong with it, in words; empty when it may be shipped


def all_builds() -> list[Build]:
    """Every configuration of every kernel."""
    return [build for builds in BUILDS.values() for build in builds()]


def report_all(processes: int) -> Iterator[Report]:
    """Reports in the order of all_builds(), as they are compiled."""
    with ProcessPoolExecutor(processes) as pool:
        yield from pool.map(_report_number, range(len(all_builds())))


def _report_number(number: int) -> Report:
    return report(all_builds()[number])


def report(build: Build) -> Report:
    """Compiles one build and reads what became of it."""
    compiled = _compile(build)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, code = _dump("-res-usage", file.name), _dump("-sass", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None, usage
    counts = {name: len(re.findall(rf"\b{name}\b", code)) for name in COUNTED}
    spills = len(re.findall(r"\b(?:STL|LDL)\b", code))
    shared = int(compiled.metadata.shared)
    faults = [f"{spills} spills"] if spills else []
    if shared > SHARED_LIMIT[build.arch]:
        faults.append(f"{shared} bytes of shared memory, {SHARED_LIMIT[build.arch]} at most")
    faults += [f"no {name}" for name in build.expects if not counts[name]]
    return Report(
        kernel=build.kernel.fn.__name__,
        arch=build.arch,
        sizes=" ".join(f"{value}" for _, value in build.block.sizes)
        + f" w{build.block.num_warps} s{build.block.num_stages}",
        label=build.label,
        registers=int(found[1]),
        stack=int(found[2]),
        spills=spills,
        shared=shared,
        counts=counts,
        faults=tuple(faults),
    )


def _compile(build: Build) -> triton.compiler.CompiledKernel:
    names = build.kernel.arg_names
    fixed = dict(build.block.sizes) | build.constants
    constants = {name: fixed[name] for name in names if name not in build.signature}
    signature = {name: build.signature.get(name, "constexpr") for name in names}
    divisible = [["tt.divisibility", 16]]
    attributes = {
        (index,): divisible
        for index, name in enumerate(names)
        if signature[name].startswith("*") or name in build.aligned
    }
    return triton.compile(
        ASTSource(build.kernel, signature, constexprs=constants, attrs=attributes),
        target=GPUTarget("cuda", build.arch, 32),
        options={"num_warps": build.block.num_warps, "num_stages": build.block.num_stages, "enable_fp_fusion": True},
    )


def _dump(what: str, cubin: str) -> str:
    done = subprocess.run([CUOBJDUMP, what, cubin], capture_output=True, text=True, check=True, env=os.environ)
    return done.stdout + done.stderr


def table(reports: list[Report]) -> str:
    """The reports in Markdown, one line each."""
    head = "| kernel | arch | tiles | features | registers | spills | shared, KiB | matrix instructions |"
    lines = [head, "|---|---|---|---|---|---|---|---|"]
    for r in reports:
        matrix = ", ".join(f"{count} {name}" for name, count in r.counts.items() if count)
        lines.append(
            f"| {r.kernel} | sm_{r.arch} | {r.sizes} | {r.label} | {r.registers} | {r.spills} | {r.shared / 1024:.0f} "
            f"| {matrix} |"
        )
    return "\n".join(lines)
