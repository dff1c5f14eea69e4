"""make kernels-check: the proof of the kernels that needs no GPU, with its figures in one line at the end.

Runs tests/kernels (float64 comparisons under Triton's interpreter, invariances, memory, cross-compilation, planted
faults) and reads the figures that the tests record. Exit code 1 when a test fails or a planted fault survives.
"""

import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parents[1]


def figures(junit: Path) -> dict[str, list[str]]:
    """What the tests recorded, by name; mutants also by whether their test passed."""
    found: dict[str, list[str]] = defaultdict(list)
    for case in ElementTree.parse(junit).iter("testcase"):
        for recorded in case.iter("property"):
            found[recorded.get("name", "")].append(recorded.get("value", ""))
        if "mutant" in (case.get("classname") or "") and case.find("skipped") is None:
            failed = case.find("failure") is not None or case.find("error") is not None
            found["mutants"].append("survived" if failed else "caught")
    return found


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        junit = Path(folder) / "kernels.xml"
        command = ["pytest", "-n", "2", "--dist", "loadfile", "-m", "not gpu", f"--junitxml={junit}", "tests/kernels"]
        done = subprocess.run(command, cwd=ROOT)
        if not junit.is_file():
            print("kernels: the tests did not run")
            return 1
        found = figures(junit)
    errors, ratios = ([float(value) for value in found[name]] for name in ("max_rel_err", "peak_ratio"))
    spills, configs = (sum(map(int, found[name])) for name in ("spills", "configs"))
    caught = found["mutants"].count("caught")
    worst, ratio = max(errors, default=float("nan")), max(ratios, default=float("nan"))
    print(
        f"kernels: max_rel_err={worst:.1e} spills={spills} configs={configs} "
        f"mutants_caught={caught}/{len(found['mutants'])} peak_ratio={ratio:.4f}"
    )
    return int(done.returncode != 0 or not (errors and ratios and configs and caught == len(found["mutants"])))


if __name__ == "__main__":
    sys.exit(main())
