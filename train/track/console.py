"""Rank 0's screen: a start-up summary, one live line while training, tables at the end.

On a terminal the line is redrawn in place; anywhere else (a log file, a pipe, SLURM) it becomes plain lines, a few a
minute.
"""

import atexit
import math
import re
import sys
import time
from collections import deque
from statistics import median
from types import TracebackType
from typing import Any

from rich.console import Console as RichConsole
from rich.console import Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from tunesmith.train.redact import on_screen
from tunesmith.train.track.unfailing_stream import unfailing_stream

PLAIN_STEPS = 10  # a plain line about every so many steps,
PLAIN_SECONDS = 5.0  # or so many seconds, less often the longer the run takes: up to a minute
REDRAWS_PER_SECOND = 8.0

Metrics = dict[str, float | None]


class Console:
    """What a person sees of a run. Closes itself when the program ends, however it ends; the cursor is never hidden.

    Args:
        plain: lines instead of a live display; None: when stdout is not a terminal.
    """

    def __init__(self, *, plain: bool | None = None) -> None:
        self._rich = RichConsole(highlight=False, emoji=False, soft_wrap=True, file=unfailing_stream("stdout"))
        self._stderr = RichConsole(highlight=False, emoji=False, soft_wrap=True, file=unfailing_stream("stderr"))
        self.plain = plain if plain is not None else not self._rich.is_terminal or self._rich.is_dumb_terminal
        self._live: Live | None = None
        self._total_steps = 0
        self._phase = ""
        self._last: tuple[int, Metrics, float] | None = None  # step, metrics, epoch of the newest step
        self._eval_loss: float | None = None
        self._durations: deque[float] = deque(maxlen=50)
        self._started = self._last_step_time = time.monotonic()
        self._drawn_at = -math.inf
        self._drawn_step = 0

    def __enter__(self) -> "Console":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def start_summary(self, rows: list[tuple[str, str]], title: str) -> None:
        """What the run will do, before it starts."""
        self._table(rows, title)

    def print(self, renderable_or_text: RenderableType) -> None:
        """Above the live line. A string is printed as it is; it is not markup."""
        if isinstance(renderable_or_text, str):
            renderable_or_text = on_screen(renderable_or_text)
        self._rich.print(renderable_or_text, markup=False)

    def warn(self, text: str) -> None:
        self._rich.print(Text.assemble(("warning: ", "bold yellow"), on_screen(text)))

    def error(self, text: str) -> None:
        """To stderr, after the live line is put away."""
        self._stop()
        self._stderr.print(Text(on_screen(text), style="red"))

    def begin(self, total_steps: int, first_step: int) -> None:
        """Training starts, or goes on from first_step; the clock for the time left starts too."""
        self._total_steps = total_steps
        self._started = self._last_step_time = time.monotonic()
        self._drawn_step = first_step
        self._phase = ""
        if not self.plain:
            self._live = Live(
                console=self._rich,
                auto_refresh=False,
                redirect_stderr=sys.stderr.isatty(),  # `2> errors.txt` stays a file
            )
            self._live.start()
            self._rich.show_cursor(True)  # Live hides it; a killed run would leave the terminal without one
            atexit.register(self._stop)

    def step(self, step: int, metrics: Metrics, *, epoch: float) -> None:
        """One optimizer step is done."""
        now = time.monotonic()
        if not self._phase:  # saving and the like are no part of a step's time
            self._durations.append(now - self._last_step_time)
        self._last_step_time = now
        self._last = (step, metrics, epoch)
        self._phase = ""
        if metrics.get("eval/loss") is not None:
            self._eval_loss = metrics["eval/loss"]
        if self.plain:
            if self._plain_line_due(step, now):
                self._plain_line(now)
        elif now - self._drawn_at >= 1 / REDRAWS_PER_SECOND or step == self._total_steps:
            self._redraw(now)

    def evaluation(self, step: int, metrics: dict[str, float]) -> None:
        """An evaluation is done: one line that stays."""
        self._eval_loss = metrics.get("eval/loss", self._eval_loss)
        figures = [f"{spoken(name)} {figure(name, value)}" for name, value in metrics.items()]
        self._rich.print(Text.assemble((f"evaluation at step {step:,}: ", "bold"), ", ".join(figures)))
        self._phase = ""
        self._last_step_time = time.monotonic()

    def phase(self, text: str) -> None:
        """What happens between steps: `saving checkpoint`, `generating answers 40/100`."""
        now, text = time.monotonic(), on_screen(text)
        same_kind = re.sub(r"\d+", "", text) == re.sub(r"\d+", "", self._phase)
        self._phase = text
        if not text or (same_kind and now - self._drawn_at < (PLAIN_SECONDS if self.plain else 1 / REDRAWS_PER_SECOND)):
            return
        if self._live:
            self._redraw(now)
        else:
            self._drawn_at = now
            self._rich.print(Text(text))

    def end(self, rows: list[tuple[str, str]], title: str) -> None:
        """The result, after the live line is put away."""
        self._phase = ""
        if self.plain and self._last and self._last[0] != self._drawn_step:
            self._plain_line(time.monotonic())
        self._stop()
        self._table(rows, title)

    def close(self) -> None:
        """Leaves the terminal as it was; may be called twice."""
        self._stop()

    def _table(self, rows: list[tuple[str, str]], title: str) -> None:
        rows = [(name, on_screen(value)) for name, value in rows]
        self._rich.print(Text(on_screen(title), style="bold"))
        if self.plain:  # a log file has no width at which rows should fold
            width = max((len(name) for name, _ in rows), default=0)
            for name, value in rows:
                self._rich.print(Text(f"  {name:<{width}}  {value}"))
            return
        table = Table.grid(padding=(0, 2))
        table.add_column(style="dim", no_wrap=True)
        table.add_column(overflow="fold")
        for name, value in rows:
            table.add_row(f"  {name}", Text(value))
        self._rich.print(table)

    def _stop(self) -> None:
        if self._live:
            live, self._live = self._live, None
            atexit.unregister(self._stop)
            if self._last:
                live.update(self._render())
            live.stop()

    def _redraw(self, now: float) -> None:
        if self._live:
            self._drawn_at = now
            self._live.update(self._render(), refresh=True)

    def _plain_line_due(self, step: int, now: float) -> bool:
        interval = min(60.0, max(PLAIN_SECONDS, (now - self._started) / 60))
        waited = now - self._drawn_at
        first_or_last = math.isinf(waited) or step == self._total_steps
        return (
            first_or_last or waited >= interval or (step - self._drawn_step >= PLAIN_STEPS and waited >= interval / 5)
        )

    def _plain_line(self, now: float) -> None:
        assert self._last
        step, metrics, epoch = self._last
        self._drawn_at, self._drawn_step = now, step
        left = self._time_left()
        parts = [f"step {step:,}/{self._total_steps:,}", f"epoch {epoch:.2f}", *self._figures(metrics)]
        self._rich.print(Text("  ".join(parts + ([f"{left} left"] if left else []))))
        self._rich.file.flush()

    def _figures(self, metrics: Metrics) -> list[str]:
        shown = {**metrics, "eval/loss": self._eval_loss}
        return [words.format(figure(name, shown[name])) for name, words in LIVE.items() if shown.get(name) is not None]

    def _time_left(self) -> str | None:
        """From the median of recent steps, which a slow one does not move."""
        if not self._last or not self._durations or self._last[0] >= self._total_steps:
            return None
        return duration((self._total_steps - self._last[0]) * median(self._durations))

    def _render(self) -> RenderableType:
        step, metrics, epoch = self._last or (0, {}, 0.0)
        left = self._time_left()
        width = min(self._rich.width, 120)
        head = Table.grid(padding=(0, 2))
        cells: list[Any] = [
            Text(f"step {step:,}/{self._total_steps:,}", style="bold"),
            ProgressBar(total=max(self._total_steps, 1), completed=step, width=max(10, width - 60)),
            Text(f"epoch {epoch:.2f}"),
            Text(f"{left} left" if left else "", style="cyan"),
            Text(self._phase, style="dim"),
        ]
        head.add_row(*cells)
        return Group(head, Text("  ".join(self._figures(metrics)), no_wrap=True, overflow="ellipsis"))


# Metrics of the live line, in order, with the words around them.
LIVE = {
    "train/loss": "loss {}",
    "eval/loss": "eval loss {}",
    "train/learning_rate": "learning rate {}",
    "train/grad_norm": "grad norm {}",
    "throughput/tokens_per_second": "{} tokens/s",
    "throughput/target_tokens_per_second": "{} targets/s",
    "throughput/mfu": "MFU {}",
    "throughput/data_fraction": "data wait {}",
    "memory/peak_memory_gib": "{} GiB",
}


def spoken(name: str) -> str:
    """eval/token_accuracy -> token accuracy"""
    return name.rsplit("/", 1)[-1].replace("_", " ")


def figure(name: str, value: float | None) -> str:
    """A metric's value as a person reads it, by what its name says it is."""
    if value is None:
        return "-"
    if not math.isfinite(value):
        return str(value)
    if "learning_rate" in name:
        return f"{value:.2e}"
    if name.endswith(("mfu", "accuracy", "exact_match", "fraction")):
        return f"{100 * value:.1f} %"
    if name.endswith("gib"):
        return f"{value:.1f}"
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4f}" if name.endswith("loss") else f"{value:.3g}"


def duration(seconds: float) -> str:
    """42 s, 3:05 min, 2:05:09 h"""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02} min"
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02} h"
