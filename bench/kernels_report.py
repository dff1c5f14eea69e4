"""make kernels-report: cross-compiles whatever kernel launches compile and writes the table docs/kernels_compiled.md.

Exit code 1 when one spills, takes more shared memory than its GPU has, or lacks the instructions it was written for.
"""

import os
import sys
from pathlib import Path

import torch
import triton
from rich.progress import Progress

from tunesmith.kernels.compile_report import Report, all_builds, report_all, table

PAGE = Path(__file__).parents[1] / "docs/kernels_compiled.md"
HEAD = """# Kernels as the compiler leaves them

Written by `make kernels-report`, which compiles for sm_80 (A100) and sm_90a (H100, H200) whatever the operations launch
there, with every candidate block, and sizes and addresses (V, D, K, OUT, ranks) that are multiples of 16 or not (odd).
Triton {triton}; registers, spills, shared memory and instructions are read off the machine code. No GPU is needed for
this, and none has been used. HGMMA is Hopper's wgmma, UTMALDG and UTMASTG its tensor copy engine, HMMA and LDGSTS
their Ampere counterparts. Tiles are the block sizes by the kernel's own arguments, then warps (w) and stages (s).

{count} configurations, {spills} spills.

"""


def compile_all() -> list[Report]:
    """All reports, with a bar on a terminal."""
    reports = []
    with Progress(transient=True) as progress:
        task = progress.add_task("compiling", total=len(all_builds()))
        for report in report_all(os.cpu_count() or 1):
            reports.append(report)
            progress.advance(task)
    return reports


def main() -> int:
    reports = compile_all()
    spills = sum(report.spills for report in reports)
    head = HEAD.format(triton=triton.__version__, count=len(reports), spills=spills)
    PAGE.write_text(head + table(reports) + "\n", encoding="utf-8")
    faulty = [report for report in reports if report.faults]
    for report in faulty:
        print(f"{report.kernel} sm_{report.arch} {report.sizes} ({report.label}): {', '.join(report.faults)}")
    print(f"kernels-report: configs={len(reports)} spills={spills} faulty={len(faulty)} (torch {torch.__version__})")
    return int(bool(faulty))


if __name__ == "__main__":
    sys.exit(main())
