"""`make torture`: what became of every test that names a row: the table in docs/reliability.md, and a closing line."""

import importlib.util
import re
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

START, END = "<!-- torture table: written by make torture -->", "<!-- end of torture table -->"


@dataclass
class Row:
    """What came of the tests of one row."""

    outcomes: list[str] = field(default_factory=list)
    happened: list[str] = field(default_factory=list)  # figures
    claims: list[str] = field(default_factory=list)  # names of tests that passed and gave no figure
    seconds: float = 0.0

    @property
    def verdict(self) -> str:
        if "failed" in self.outcomes:
            return f"**FAILED** ({self.outcomes.count('failed')} of {len(self.outcomes)})"
        skipped = self.outcomes.count("skipped")
        passed = f"passed ({len(self.outcomes) - skipped})"
        return "skipped" if skipped == len(self.outcomes) else passed + (f", skipped ({skipped})" if skipped else "")


class TortureTable:
    """A pytest plugin: gathers reports on the controller, whatever worker they come from."""

    def __init__(self, target: Path) -> None:
        self.target = target
        self.rows: dict[int, Row] = defaultdict(Row)
        self._outcomes: dict[str, str] = {}  # of each test; one may show several rows
        self._started = time.monotonic()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        said: dict[str, Any] = defaultdict(list)
        for name, value in report.user_properties:
            said[name].append(value)
        for number in said["row"]:
            row = self.rows[number]
            row.seconds += report.duration
            if report.when == "call" or report.outcome != "passed":
                self._outcomes[report.nodeid] = report.outcome
                row.outcomes.append(report.outcome)
                row.happened += [text for text in said["happened"] if text not in row.happened]
                if report.outcome == "passed" and not said["happened"] and claim(report.nodeid) not in row.claims:
                    row.claims.append(claim(report.nodeid))

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        outcomes = list(self._outcomes.values())
        passed, failed, skipped = (outcomes.count(kind) for kind in ("passed", "failed", "skipped"))
        self._write()
        seconds = time.monotonic() - self._started
        terminalreporter.write_line(f"torture: {passed} passed, {failed} failed, {skipped} skipped in {seconds:.0f} s")

    def _write(self) -> None:
        text = self.target.read_text(encoding="utf-8")
        before, rest = text.split(START)
        table, after = rest.split(END)
        self.target.write_text(f"{before}{START}\n{self.markdown(table)}\n{END}{after}", encoding="utf-8")

    def markdown(self, former: str) -> str:
        """The table, a line for each row of the groundwork; a row that was not run keeps its line of the former one."""
        before = {line.split("|")[1].strip(): line for line in former.splitlines() if line.startswith("|")}
        faults, absent = known_rows()
        lines = ["| # | fault | must | what happened | s | verdict |", "|---|---|---|---|---|---|"]
        for number in sorted(faults | absent):
            if number not in self.rows:
                what = absent.get(number) or faults[number][0]
                lines.append(before.get(str(number), f"| {number} | {what} | | | | not run |"))
                continue
            fault, must = faults[number]
            row = self.rows[number]
            happened = re.sub(r"\s+", " ", "; ".join(row.happened or row.claims)).replace("|", "/")
            lines.append(f"| {number} | {fault} | {must} | {happened} | {row.seconds:.0f} | {row.verdict} |")
        return "\n".join(lines)


def claim(nodeid: str) -> str:
    """What a test's name says, as words."""
    return nodeid.rpartition("::")[2].partition("[")[0].removeprefix("test_").replace("_", " ")


def known_rows() -> tuple[dict[int, tuple[str, str]], dict[int, str]]:
    spec = importlib.util.spec_from_file_location("rows", Path(__file__).with_name("rows.py"))
    assert spec is not None
    assert spec.loader is not None
    rows = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(rows)
    return rows.FAULTS, rows.ABSENT
