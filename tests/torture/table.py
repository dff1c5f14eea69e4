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
    happened: list[str] = field(default_factory=list)
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
        self._started = time.monotonic()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        said: dict[str, Any] = defaultdict(list)
        for name, value in report.user_properties:
            said[name].append(value)
        for number in said["row"]:
            row = self.rows[number]
            row.seconds += report.duration
            if report.when == "call" or report.outcome != "passed":
                row.outcomes.append(report.outcome)
                row.happened += [text for text in said["happened"] if text not in row.happened]

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        outcomes = [outcome for row in self.rows.values() for outcome in row.outcomes]
        passed, failed, skipped = (outcomes.count(kind) for kind in ("passed", "failed", "skipped"))
        self._write()
        seconds = time.monotonic() - self._started
        terminalreporter.write_line(f"torture: {passed} passed, {failed} failed, {skipped} skipped in {seconds:.0f} s")

    def _write(self) -> None:
        text = self.target.read_text(encoding="utf-8")
        before, rest = text.split(START)
        after = rest.split(END)[1]
        self.target.write_text(f"{before}{START}\n{self.markdown()}\n{END}{after}", encoding="utf-8")

    def markdown(self) -> str:
        """The table, a line for each row of the groundwork."""
        faults, absent = known_rows()
        lines = ["| # | fault | must | what happened | s | verdict |", "|---|---|---|---|---|---|"]
        for number in sorted(faults | absent):
            if number not in self.rows:
                lines.append(f"| {number} | {absent.get(number) or faults[number][0]} | | | | not run |")
                continue
            fault, must = faults[number]
            row = self.rows[number]
            happened = re.sub(r"\s+", " ", "; ".join(row.happened)).replace("|", "/")
            lines.append(f"| {number} | {fault} | {must} | {happened} | {row.seconds:.0f} | {row.verdict} |")
        return "\n".join(lines)


def known_rows() -> tuple[dict[int, tuple[str, str]], dict[int, str]]:
    spec = importlib.util.spec_from_file_location("rows", Path(__file__).with_name("rows.py"))
    assert spec is not None
    assert spec.loader is not None
    rows = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(rows)
    return rows.FAULTS, rows.ABSENT
