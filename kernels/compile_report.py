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

from tunesmith.kernels.compile_builds import all_builds
from tunesmith.kernels.dry_launches import Launch

SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}  # bytes of one thread block, CUDA C++ programming guide, table 28
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
COUNTED = ("HGMMA", "HMMA", "UTMALDG", "UTMASTG", "LDGSTS")
ROW_INSTRUCTIONS = 25  # so that the row kernel waits for memory: docs/kernels.md
EXPECTED = {  # instructions that a kernel is written for
    ("lce_gemm_tma_kernel", 90): ("HGMMA", "UTMALDG"),
    ("lce_gemm_kernel", 80): ("HMMA",),
}


@dataclass(frozen=True)
class Report:
    """One build, compiled."""

    kernel: str
    arch: int
    sizes: str
    features: str
    registers: int
    stack: int  # bytes
    spills: int  # instructions that store to or load from local memory
    shared: int  # bytes
    counts: dict[str, int]  # of COUNTED
    an_element: float | None  # instructions, of kernels that go through rows of logits
    faults: tuple[str, ...]  # what is wrong with it, in words; empty when it may be shipped


def report_all(processes: int) -> Iterator[Report]:
    """Reports in the order of all_builds(), as they are compiled."""
    with ProcessPoolExecutor(processes) as pool:
        yield from pool.map(_report_number, range(len(all_builds())))


def _report_number(number: int) -> Report:
    return report(all_builds()[number])


def report(build: Launch) -> Report:
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
    name = build.kernel.fn.__name__
    an_element = row_instructions(build, code)
    if an_element is not None and an_element > ROW_INSTRUCTIONS:
        faults.append(f"{an_element:.1f} instructions an element, {ROW_INSTRUCTIONS} at most")
    faults += [f"no {instruction}" for instruction in EXPECTED.get((name, build.arch), ()) if not counts[instruction]]
    return Report(
        kernel=name,
        arch=build.arch,
        sizes=_sizes(build),
        features=features(build),
        registers=int(found[1]),
        stack=int(found[2]),
        spills=spills,
        shared=shared,
        counts=counts,
        an_element=an_element,
        faults=tuple(faults),
    )


def row_instructions(build: Launch, code: str) -> float | None:
    """Instructions for an element in both passes of the row kernel without bias, cap and statistics, else None.

    Each pass is two loops, the shorter of which is over the inner tiles; only the second pass stores.
    """
    constants = {build.kernel.arg_names[index[0]]: value for index, value in build.constants.items()}
    plain = not any(constants.get(flag) for flag in ("HAS_BIAS", "HAS_CAP", "STATS")) and constants.get("GRAD")
    if build.kernel.fn.__name__ != "lce_rows_kernel" or not plain:
        return None
    bodies = loops(code)
    stores = ["STG" in " ".join(body) for body in bodies]
    shortest = [min(len(body) for body, s in zip(bodies, stores, strict=True) if s == stored) for stored in (0, 1)]
    return sum(shortest) / (constants["BLOCK_V"] / (32 * build.num_warps))


def loops(code: str) -> list[list[str]]:
    """The instructions of each loop: from where a branch goes back to, up to the branch."""
    instructions = [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;/]+);", code)]
    found = []
    for at, text in instructions:
        branch = re.search(r"\bBRA\b.*?(0x[0-9a-f]+)", text)
        if branch and int(branch[1], 16) < at:
            found.append([body for place, body in instructions if int(branch[1], 16) <= place <= at])
    return found


def _sizes(build: Launch) -> str:
    """Block sizes by the kernel's own arguments, warps and stages."""
    named = ((build.kernel.arg_names[index[0]], value) for index, value in build.constants.items())
    sizes = " ".join(str(value) for name, value in named if name.startswith("BLOCK"))
    return f"{sizes} w{build.num_warps} s{build.num_stages}"


def features(build: Launch) -> str:
    """Element type, flags that are on, and integers that are 1 or no multiple of 16 and compiled for that."""
    names = build.kernel.arg_names
    pointers = [kind[1:] for kind in build.signature.values() if kind.startswith("*") and kind != "*i64"]
    on = [names[index[0]] for index, value in build.constants.items() if value is True]
    ones = [
        f"{p.name}=1" for p in build.kernel.params if not p.is_constexpr and build.constants.get((p.num,)) is not None
    ]
    uneven = [
        f"odd {parameter.name}"
        for parameter in build.kernel.params
        if build.signature[parameter.name].startswith(("i", "*"))
        and not (parameter.do_not_specialize or parameter.do_not_specialize_on_alignment)
        and not build.attributes.get((parameter.num,))
    ]
    return ", ".join([" ".join([pointers[0], *on]), *ones, *uneven])


def _compile(build: Launch) -> triton.compiler.CompiledKernel:
    return triton.compile(
        ASTSource(build.kernel, build.signature, constexprs=build.constants, attrs=build.attributes),
        target=GPUTarget("cuda", build.arch, 32),
        options={"num_warps": build.num_warps, "num_stages": build.num_stages},
    )


def _dump(what: str, cubin: str) -> str:
    done = subprocess.run([CUOBJDUMP, what, cubin], capture_output=True, text=True, check=True, env=os.environ)
    return done.stdout + done.stderr


def table(reports: list[Report]) -> str:
    """The reports in Markdown, one line each."""
    head = "| kernel | arch | tiles | features | registers | spills | shared, KiB | instructions |"
    lines = [head, "|---|---|---|---|---|---|---|---|"]
    for r in reports:
        matrix = ", ".join(f"{count} {name}" for name, count in r.counts.items() if count)
        matrix = matrix if r.an_element is None else f"{r.an_element:.1f} an element"
        shared = f"{r.shared / 1024:.0f}"
        cells = (r.kernel, f"sm_{r.arch}", r.sizes, r.features, r.registers, r.spills, shared, matrix)
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)
