"""The numbers of a run, on rank 0: files in the run folder, and Weights & Biases.

The files (metrics.jsonl, samples.jsonl, plan.json, summary.json) are the record and are written as the run goes. W&B is
a copy that may fail: it lives in a thread of its own, so that a slow or dead server delays neither the start nor a
step, and it ends with one warning. This is the only file that knows W&B.
"""

import contextlib
import logging
import netrc
import os
import queue
import secrets
import shlex
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import orjson

from tunesmith.train.config.config import Config, TrackConfig, WandbMode
from tunesmith.train.files.durable import write_atomically
from tunesmith.train.files.rows import finite, keep_rows, read_rows, write_rows
from tunesmith.train.files.run_folder import SUMMARY
from tunesmith.train.redact import redact, redact_text

METRICS_FILE = "metrics.jsonl"
SAMPLES_FILE = "samples.jsonl"
PLAN_FILE = "plan.json"  # what a running run is about to do: how many steps there are in all
WANDB_ID_FILE = "wandb_id.txt"

INIT_TIMEOUT = 8.0  # seconds for a server to take the run; wandb's own 90 s, then a crash: wandb #7086
FINISH_TIMEOUT = 30.0  # seconds for the last rows to be uploaded; what is left stays on disk for `wandb sync`
MAX_QUEUED = 20_000  # calls waiting for W&B, some 20 MB, before rows are left out

logger = logging.getLogger(__name__)


@dataclass
class Sample:
    """One generated answer beside the one that was expected."""

    prompt: str
    expected: str
    generated: str
    exact: bool


class Tracker:
    """Writes a run's numbers down.

    Args:
        config: of the run; its name and `track` group are read.
        run_dir: folder of the run; it exists.
        resolved: the whole config as plain values; goes to W&B, redacted.
        resume_step: step the run goes on from; rows of later steps are dropped, so that each stands once. 0: a new run.
        warn: shows one line to the user, from any thread.
    """

    def __init__(
        self,
        config: Config,
        run_dir: Path,
        *,
        resolved: dict[str, Any],
        resume_step: int = 0,
        warn: Callable[[str], None] = logger.warning,
    ) -> None:
        self._run_dir = Path(run_dir)
        self._warn = warn
        self._failed: set[str] = set()
        seconds = self._keep_rows(resume_step)
        self._started = time.monotonic() - seconds
        self._metrics = (self._run_dir / METRICS_FILE).open("ab", buffering=0)
        self._wandb = start_wandb(config, self._run_dir, resolved, resume_step, warn)

    def plan(self, total_steps: int) -> None:
        """Writes down how many optimizer steps there are in all, for who looks at the running run from outside."""
        with self._never_raises(PLAN_FILE):
            write_atomically(self._run_dir / PLAN_FILE, orjson.dumps({"total_steps": total_steps}) + b"\n")

    def go_back(self, step: int) -> None:
        """Drops the rows after a step from the files. W&B keeps them: it takes no second row for a step."""
        with self._never_raises(METRICS_FILE):
            self._keep_rows(step)
            before, self._metrics = self._metrics, (self._run_dir / METRICS_FILE).open("ab", buffering=0)
            before.close()

    def _keep_rows(self, last_step: int) -> float:
        """Drops later rows; gives the seconds in the last one left."""
        rows = keep_rows(self._run_dir / METRICS_FILE, last_step)
        keep_rows(self._run_dir / SAMPLES_FILE, last_step)
        return float(rows[-1].get("seconds") or 0.0) if rows else 0.0

    def log(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """One row. None is null; a value that is not finite is null too, flagged by `<name>_nonfinite`."""
        row: dict[str, Any] = {"step": step, "seconds": round(time.monotonic() - self._started, 3)}
        for name, value in metrics.items():
            row[name] = finite(value)
            if value is not None and row[name] is None:
                row[f"{name}_nonfinite"] = True
        with self._never_raises(METRICS_FILE):
            self._metrics.write(orjson.dumps(row, option=orjson.OPT_SERIALIZE_NUMPY) + b"\n")  # one write: no torn rows
        if self._wandb:
            self._wandb.log(step, {name: float(value) for name, value in metrics.items() if value is not None})

    def samples(self, step: int, samples: list[Sample]) -> None:
        """Answers generated at a step; those written for the same step before are replaced."""
        path = self._run_dir / SAMPLES_FILE
        with self._never_raises(SAMPLES_FILE):
            rows = [row for row in read_rows(path) if row["step"] != step]
            write_rows(path, rows + [{"step": step, **asdict(sample)} for sample in samples])
        if self._wandb:
            self._wandb.log_samples(step, samples)

    def finish(self, summary: dict[str, Any], *, exit_code: int = 0) -> None:
        """Writes summary.json and closes everything; waits for W&B no longer than FINISH_TIMEOUT and a little."""
        clean = redact(summary)
        with self._never_raises(SUMMARY):
            options = orjson.OPT_INDENT_2 | orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_NON_STR_KEYS
            write_atomically(self._run_dir / SUMMARY, orjson.dumps(clean, default=str, option=options) + b"\n")
            os.fsync(self._metrics.fileno())
        self._metrics.close()
        if self._wandb:
            self._wandb.finish(clean, exit_code)

    @property
    def wandb_place(self) -> str | None:
        """Where the run is in W&B: its address, or how to upload it; None when W&B is off or not ready yet."""
        return self._wandb.place if self._wandb else None

    @contextlib.contextmanager
    def _never_raises(self, name: str) -> Any:
        """A full disk or a lost mount must not end the training: one warning for each file."""
        try:
            yield
        except OSError as error:
            if name not in self._failed:
                self._failed.add(name)
                self._warn(f"{self._run_dir / name} cannot be written ({error}); training goes on.")


def start_wandb(
    config: Config, run_dir: Path, resolved: dict[str, Any], resume_step: int, warn: Callable[[str], None]
) -> "WandbThread | None":
    """Begins to open the run in W&B; None when it is switched off or not installed."""
    mode = wandb_mode(config.track, warn)
    if mode is WandbMode.disabled:
        return None
    # Its crash reports go to the server even offline, and hold up the exit for 20 s when that stalls (seen in 0.31.0).
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    try:
        import wandb  # noqa: F401 - here and not in the thread: two threads importing at once can deadlock
    except Exception as error:
        warn(f"W&B is off: import wandb failed ({redact_text(str(error))}).")
        return None
    id_file = run_dir / WANDB_ID_FILE
    if not (resume_step and id_file.exists()):
        id_file.write_text(secrets.token_hex(4))
    arguments = {
        "id": id_file.read_text().strip(),
        "resume": "allow",
        "project": redact_text(config.track.project),
        "name": redact_text(config.name),
        "group": redact_text(config.track.group) if config.track.group else None,
        "tags": [redact_text(tag) for tag in config.track.tags],
        "config": redact(resolved),
    }
    return WandbThread(mode, run_dir, arguments, warn)


def wandb_mode(track: TrackConfig, warn: Callable[[str], None]) -> WandbMode:
    """The mode W&B will run in: online, offline or disabled. A WANDB_MODE in the environment decides for `auto`."""
    mode = track.wandb
    if mode is WandbMode.auto and os.environ.get("WANDB_MODE") in ("online", "offline", "disabled"):
        mode = WandbMode(os.environ["WANDB_MODE"])
    if mode is WandbMode.online and not has_wandb_key():
        warn("W&B has no API key, so this run is logged offline; run `wandb login` or set WANDB_API_KEY.")
    if mode in (WandbMode.auto, WandbMode.online):
        return WandbMode.online if has_wandb_key() else WandbMode.offline
    return mode


def has_wandb_key() -> bool:
    """Whether W&B will find a key by itself: in the environment or in netrc. Without one it would ask, and block."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    path = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).netloc
    try:
        return netrc.netrc(path).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


class WandbThread:
    """A W&B run that is fed from a queue. Opening it, every row, and closing it happen in one thread."""

    def __init__(self, mode: WandbMode, run_dir: Path, arguments: dict[str, Any], warn: Callable[[str], None]) -> None:
        self.place: str | None = None
        self._run_dir = run_dir
        self._arguments = arguments
        self._warn = warn
        self._calls: queue.Queue[Callable[[Any], None] | None] = queue.Queue(MAX_QUEUED)
        self._full = False
        self._thread = threading.Thread(target=self._work, args=(mode,), name="wandb", daemon=True)
        self._thread.start()

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self._put(lambda run: run.log(metrics, step=step))

    def log_samples(self, step: int, samples: list[Sample]) -> None:
        columns = ["prompt", "expected", "generated", "exact"]
        rows = [[getattr(sample, column) for column in columns] for sample in samples]

        def log_table(run: Any) -> None:
            import wandb

            run.log({"eval/samples": wandb.Table(columns=columns, data=rows)}, step=step)

        self._put(log_table)

    def finish(self, summary: dict[str, Any], exit_code: int) -> None:
        def close(run: Any) -> None:
            run.summary.update(summary)
            try:
                run.finish(exit_code=exit_code)
            except TimeoutError:
                self._warn(f"W&B did not take all rows within {FINISH_TIMEOUT:.0f} s; {sync_hint(run)}.")

        self._put(close)
        self._put(None)
        self._thread.join(INIT_TIMEOUT + FINISH_TIMEOUT + 5.0)
        if self._thread.is_alive():
            self._warn(f"W&B is still busy and was left behind; {METRICS_FILE} has every row.")

    def _put(self, call: Callable[[Any], None] | None) -> None:
        if not self._thread.is_alive():
            return
        try:
            self._calls.put_nowait(call)
        except queue.Full:
            if not self._full:
                self._full = True
                self._warn(f"W&B does not keep up, some rows will be missing there; {METRICS_FILE} has all of them.")

    def _work(self, mode: WandbMode) -> None:
        try:
            run = self._open(mode)
            while call := self._calls.get():
                call(run)
        except Exception as error:
            self._warn(f"W&B is off from here ({one_line(error)}); {METRICS_FILE} goes on.")
        with contextlib.suppress(Exception):
            import wandb

            wandb.teardown(exit_code=1)  # closes what a failure left open; after finish() there is nothing

    def _open(self, mode: WandbMode) -> Any:
        """The run, offline when the server does not take it in time."""
        import wandb

        reason = None
        if mode is WandbMode.online:
            try:
                run = self._init(mode)
                self.place = run.url
                return run
            except Exception as error:
                reason = one_line(error)
                wandb.teardown(exit_code=1)  # or the id counts as in use
        run = self._init(WandbMode.offline)
        self.place = sync_hint(run)
        if reason:
            self._warn(f"W&B cannot be reached ({reason}): logging offline; {self.place}.")
        return run

    def _init(self, mode: WandbMode) -> Any:
        import wandb

        wandb.setup(wandb.Settings(silent=True))  # or it prints where it found the key
        settings = wandb.Settings(
            mode=mode.value,
            root_dir=str(self._run_dir),  # it adds the folder wandb/
            init_timeout=INIT_TIMEOUT,
            finish_timeout=FINISH_TIMEOUT,
            finish_timeout_raises=True,
            x_service_wait=INIT_TIMEOUT,
            silent=True,
            console="off",
            reinit="create_new",
            # What it would record by itself: command line and git remote (the metadata), packages, the script.
            x_disable_meta=True,
            x_save_requirements=False,
            save_code=False,
            disable_code=True,
            disable_git=True,
            label_disable=True,
        )
        run = wandb.init(settings=settings, **self._arguments)
        run.define_metric("eval/loss", summary="min")
        return run


def sync_hint(run: Any) -> str:
    return f"upload it with `wandb sync {shlex.quote(str(Path(run.dir).parent))}`"


def one_line(error: BaseException) -> str:
    """An error as one short line without secrets."""
    text = " ".join(redact_text(f"{type(error).__name__}: {error}").split())
    return text if len(text) <= 160 else f"{text[:157]}..."
