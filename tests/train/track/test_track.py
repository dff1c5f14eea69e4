import http.server
import json
import math
import os
import socket
import struct
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import orjson
import pytest

from tunesmith.train.config.config import TrackConfig, WandbMode
from tunesmith.train.track import track
from tunesmith.train.track.track import Sample, Tracker

SAMPLES = [
    Sample(prompt="How do I log in?", expected="With your e-mail.", generated="With your e-mail.", exact=True),
    Sample(prompt="Can I pay monthly?", expected="Yes.", generated="No.", exact=False),
]


@pytest.fixture(autouse=True)
def no_wandb_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The tests decide what W&B finds, not the machine they run on."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "wandb-config"))
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    return folder


def config(mode: WandbMode = WandbMode.disabled, **options: Any) -> Any:
    return SimpleNamespace(name="support_bot", track=TrackConfig(wandb=mode, **options))


def open_tracker(run_dir: Path, mode: WandbMode = WandbMode.disabled, **options: Any) -> Tracker:
    return Tracker(config(mode), run_dir, resolved={"seed": 0}, **options)


def rows_of(path: Path) -> list[dict[str, Any]]:
    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def wandb_records(run_dir: Path) -> list[Any]:
    """What W&B's files hold: after a header of 7 bytes LevelDB's log format, a protobuf in each record."""
    from wandb.proto.wandb_internal_pb2 import Record

    records = []
    for file in sorted(run_dir.glob("wandb/*run-*/*.wandb")):
        content, position, partial = file.read_bytes(), 7, b""
        assert content[:4] == b":W&B"
        while position + 7 <= len(content):
            if 32768 - position % 32768 < 7:  # the rest of a block is too short for a header
                position += 32768 - position % 32768
                continue
            _, length, kind = struct.unpack("<IHB", content[position : position + 7])
            partial += content[position + 7 : position + 7 + length]
            position += 7 + length
            if kind in (1, 4):  # whole, or the last part
                record = Record()
                record.ParseFromString(partial)
                records.append(record)
                partial = b""
    return records


def logged_to_wandb(run_dir: Path) -> list[dict[str, Any]]:
    histories = [record.history for record in wandb_records(run_dir) if record.WhichOneof("record_type") == "history"]
    return [
        {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in history.item}
        for history in histories
    ]


# --- files ------------------------------------------------------------------------------------------------------------


def test_every_row_has_its_step_and_seconds(run_dir: Path) -> None:
    tracker = open_tracker(run_dir)
    tracker.log(1, {"train/loss": 2.5, "eval/loss": None})
    tracker.log(2, {"train/loss": 2.25})
    first, second = rows_of(run_dir / "metrics.jsonl")  # readable while the run goes on
    tracker.finish({})
    assert first == {"step": 1, "seconds": first["seconds"], "train/loss": 2.5, "eval/loss": None}
    assert 0 <= first["seconds"] <= second["seconds"] < 60


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_is_flagged_null_in_valid_json(run_dir: Path, value: float) -> None:
    tracker = open_tracker(run_dir)
    tracker.log(1, {"train/loss": value})
    tracker.finish({"eval": {"perplexity": value}})
    (row,) = rows_of(run_dir / "metrics.jsonl")
    assert row["train/loss"] is None
    assert row["train/loss_nonfinite"] is True
    assert json.loads((run_dir / "summary.json").read_text()) == {"eval": {"perplexity": None}}


def test_resuming_drops_later_rows_and_repairs_a_torn_line(run_dir: Path) -> None:
    tracker = open_tracker(run_dir)
    for step in range(1, 8):
        tracker.log(step, {"train/loss": float(step)})
        tracker.samples(step, SAMPLES[:1])
    tracker.finish({})
    path = run_dir / "metrics.jsonl"
    path.write_bytes(path.read_bytes() + b'{"step": 8, "seconds": 1.0, "train/lo')
    tracker = open_tracker(run_dir, resume_step=5)
    tracker.log(6, {"train/loss": 6.5})
    tracker.finish({})
    rows = rows_of(path)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert rows[-1]["train/loss"] == 6.5
    assert rows[-1]["seconds"] >= rows[-2]["seconds"]
    assert [row["step"] for row in rows_of(run_dir / "samples.jsonl")] == [1, 2, 3, 4, 5]
    assert not list(run_dir.glob(".tunesmith-*"))


def test_a_torn_line_within_the_kept_steps_costs_only_itself(run_dir: Path) -> None:
    (run_dir / "metrics.jsonl").write_bytes(b'{"step": 1, "seconds": 0.1}\n{"step": 2, "sec')
    tracker = open_tracker(run_dir, resume_step=2)
    tracker.log(3, {})
    tracker.finish({})
    assert [row["step"] for row in rows_of(run_dir / "metrics.jsonl")] == [1, 3]


def test_a_new_run_in_an_old_folder_starts_empty(run_dir: Path) -> None:
    (run_dir / "metrics.jsonl").write_text('{"step": 0}\n{"step": 1}\n')
    open_tracker(run_dir).finish({})
    assert rows_of(run_dir / "metrics.jsonl") == []


def test_samples_of_the_same_step_are_replaced(run_dir: Path) -> None:
    tracker = open_tracker(run_dir)
    tracker.samples(3, SAMPLES[:1])
    tracker.samples(6, SAMPLES)
    tracker.samples(6, SAMPLES[1:])
    tracker.finish({})
    rows = rows_of(run_dir / "samples.jsonl")
    assert [(row["step"], row["prompt"], row["exact"]) for row in rows] == [
        (3, "How do I log in?", True),
        (6, "Can I pay monthly?", False),
    ]


def test_a_disk_that_fills_up_is_one_warning_and_no_crash(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    warnings: list[str] = []
    tracker = open_tracker(run_dir, warn=warnings.append)

    class FullDisk:
        def write(self, _: bytes) -> None:
            raise OSError(28, "No space left on device")

        def fileno(self) -> int:
            raise OSError(28, "No space left on device")

        def close(self) -> None: ...

    tracker._metrics.close()
    monkeypatch.setattr(tracker, "_metrics", FullDisk())
    for step in range(5):
        tracker.log(step, {"train/loss": 1.0})
    tracker.finish({})
    assert [text for text in warnings if "metrics.jsonl" in text and "No space left" in text] == warnings[:1]


def test_wandb_is_not_imported_when_it_is_off(run_dir: Path) -> None:
    code = f"""
        import sys
        from pathlib import Path
        from types import SimpleNamespace
        from tunesmith.train.config.config import TrackConfig, WandbMode
        from tunesmith.train.track.track import Tracker
        config = SimpleNamespace(name="x", track=TrackConfig(wandb=WandbMode.disabled))
        tracker = Tracker(config, Path({str(run_dir)!r}), resolved={{}})
        tracker.log(1, {{"train/loss": 1.0}})
        tracker.finish({{}})
        assert "wandb" not in sys.modules
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)
    assert sorted(path.name for path in run_dir.iterdir()) == ["metrics.jsonl", "summary.json"]


# --- Weights & Biases -------------------------------------------------------------------------------------------------


def test_an_offline_run_reads_back(run_dir: Path) -> None:
    warnings: list[str] = []
    resolved = {"seed": 7, "model": {"name_or_path": "conf://tiny"}, "hub": {"token": "very-secret-token"}}
    options = config(WandbMode.auto, tags=["demo", "cpu"], group="night", project="bots")
    tracker = Tracker(options, run_dir, resolved=resolved, warn=warnings.append)
    for step in (1, 2, 3):
        tracker.log(step, {"train/loss": 1.0 / step, "throughput/mfu": None})
    tracker.log(3, {"eval/loss": 0.5})
    tracker.samples(3, SAMPLES)
    tracker.finish({"status": "finished", "eval": {"loss": 0.5}})

    assert warnings == []
    assert "wandb sync" in str(tracker.wandb_place)
    rows = logged_to_wandb(run_dir)
    assert [(row["_step"], row["train/loss"]) for row in rows if "train/loss" in row] == [
        (1, 1.0),
        (2, 0.5),
        (3, 1 / 3),
    ]
    assert [row["_step"] for row in rows if "eval/loss" in row] == [3]
    assert not any("throughput/mfu" in row for row in rows)

    (run,) = [record.run for record in wandb_records(run_dir) if record.WhichOneof("record_type") == "run"]
    assert (run.project, run.display_name, run.run_group, sorted(run.tags)) == (
        "bots",
        "support_bot",
        "night",
        ["cpu", "demo"],
    )
    assert run.run_id == (run_dir / "wandb_id.txt").read_text()
    uploaded = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert uploaded["model"] == {"name_or_path": "conf://tiny"}
    assert uploaded["hub"] == {"token": "***"}

    (table,) = run_dir.glob("wandb/offline-run-*/files/media/table/eval/*.json")
    assert json.loads(table.read_text()) == {
        "columns": ["prompt", "expected", "generated", "exact"],
        "data": [[sample.prompt, sample.expected, sample.generated, sample.exact] for sample in SAMPLES],
    }


def test_a_resumed_run_keeps_its_wandb_id_and_a_new_one_does_not(run_dir: Path) -> None:
    ids = []
    for resume_step in (0, 2, 0):
        tracker = open_tracker(run_dir, WandbMode.offline, resume_step=resume_step)
        tracker.log(resume_step + 1, {"train/loss": 1.0})
        tracker.finish({})
        ids.append((run_dir / "wandb_id.txt").read_text())
    assert ids[0] == ids[1] != ids[2]
    assert {record.run.run_id for record in wandb_records(run_dir) if record.HasField("run")} == set(ids)


CANARIES = {f"kanarienvogel{number}xq" for number in range(8)}


def test_no_secret_is_found_in_any_byte_of_the_run_folder(run_dir: Path) -> None:
    code = f"""
        from pathlib import Path
        from types import SimpleNamespace
        from tunesmith.train.config.config import TrackConfig
        from tunesmith.train.track.track import Sample, Tracker
        resolved = {{
            "name": "x",
            "api_key": "kanarienvogel4xq",
            "nested": [{{"password": "kanarienvogel5xq"}}],
            "data": {{"train": "https://user:kanarienvogel6xq@host/x.jsonl", "note": "key is kanarienvogel0xq"}},
        }}
        tracker = Tracker(SimpleNamespace(name="x", track=TrackConfig()), Path({str(run_dir)!r}), resolved=resolved)
        tracker.log(1, {{"train/loss": 1.0}})
        tracker.samples(1, [Sample("a", "b", "c", False)])
        tracker.finish({{"status": "failed", "error": "as kanarienvogel1xq with password=kanarienvogel7xq"}})
        assert "wandb sync" in tracker.wandb_place
    """
    script = run_dir.parent / "script.py"
    script.write_text(textwrap.dedent(code))
    environment = os.environ | {
        "HF_TOKEN": "kanarienvogel0xq",
        "MY_PASSWORD": "kanarienvogel1xq",
        "HTTPS_PROXY": "http://me:kanarienvogel2xq@proxy.invalid:3128",
    }
    arguments = ["+hub.token=kanarienvogel3xq", "--api-key", "kanarienvogel3xq", "https://me:kanarienvogel6xq@host/"]
    subprocess.run([sys.executable, str(script), *arguments], check=True, env=environment, cwd=run_dir.parent)

    everything = b"".join(path.read_bytes() for path in run_dir.rglob("*") if path.is_file())
    assert b"train/loss" in everything
    assert logged_to_wandb(run_dir)  # so the search below did look at a run
    assert [canary for canary in sorted(CANARIES) if canary.encode() in everything] == []
    assert b"script.py" not in everything
    assert not list(run_dir.rglob("wandb-metadata.json"))


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0123456789" * 4)
    monkeypatch.setattr(track, "INIT_TIMEOUT", 2.0)


@pytest.fixture
def stalling_server() -> Iterator[str]:
    """Takes every connection and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        connections: list[socket.socket] = []

        def accept() -> None:
            while True:
                try:
                    connections.append(server.accept()[0])
                except OSError:
                    return

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}"
        assert connections, "W&B never called the server"
        server.shutdown(socket.SHUT_RDWR)
        thread.join()
        for connection in connections:
            connection.close()


@pytest.mark.row(25)
def test_a_server_that_stalls_delays_nothing(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, stalling_server: str
) -> None:
    assert track.INIT_TIMEOUT <= 10
    monkeypatch.setattr(track, "INIT_TIMEOUT", 3.0)
    monkeypatch.setenv("WANDB_API_KEY", "0123456789" * 4)
    monkeypatch.setenv("WANDB_BASE_URL", stalling_server)
    warnings: list[str] = []
    tracker = open_tracker(run_dir, WandbMode.auto, warn=warnings.append)
    for step in range(1, 101):
        tracker.log(step, {"train/loss": 1.0})
    assert not warnings  # the server is asked in the background, and was not given up yet
    tracker.finish({"status": "finished"})  # it never answers: to wait for it would never end
    assert len(warnings) == 1
    assert "cannot be reached" in warnings[0]
    assert "wandb sync" in warnings[0]
    assert len([row for row in logged_to_wandb(run_dir) if "train/loss" in row]) == 100  # none lost while it waited
    assert len(rows_of(run_dir / "metrics.jsonl")) == 100


class Backend(http.server.BaseHTTPRequestHandler):
    """As much of the W&B server as a run needs to start; it stops answering when `stalls` is set, or answers 500."""

    stalls = threading.Event()
    fails = threading.Event()
    ended = threading.Event()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.stalls.is_set():
            self.ended.wait(60)
            return
        if self.fails.is_set():
            self.send_error(500)
            return
        bucket = {"id": "x", "name": "x", "displayName": "x", "project": {"name": "p", "entity": {"name": "e"}}}
        data = {"upsertBucket": {"bucket": bucket, "inserted": True}} if b"upsertBucket" in body else {"model": None}
        answer = json.dumps({"data": data}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Backend]]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Backend) as server:
        monkeypatch.setenv("WANDB_API_KEY", "0123456789" * 4)
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.server_port}")
        Backend.stalls.clear()
        Backend.fails.clear()
        Backend.ended.clear()
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield Backend
        Backend.ended.set()
        server.shutdown()
        thread.join()


@pytest.mark.row(25)
@pytest.mark.parametrize("fault", ["stalls", "fails"])  # it hangs, or answers 500
def test_a_server_that_breaks_in_mid_run_delays_only_the_end_and_loses_no_row(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, backend: type[Backend], fault: str
) -> None:
    monkeypatch.setattr(track, "FINISH_TIMEOUT", 1.0)
    warnings: list[str] = []
    tracker = open_tracker(run_dir, WandbMode.auto, warn=warnings.append)
    deadline = time.monotonic() + 8
    while tracker.wandb_place is None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert str(tracker.wandb_place).startswith("http://127.0.0.1"), warnings  # it is online
    getattr(backend, fault).set()
    for step in range(1, 1001):
        tracker.log(step, {"train/loss": 1.0})
    tracker.finish({})  # while it stalls it never answers: to wait for it would never end
    assert len(warnings) == 1 if fault == "stalls" else len(warnings) <= 1
    if fault == "stalls":
        assert "did not take all rows" in warnings[0]
        assert "wandb sync" in warnings[0]
    assert len(rows_of(run_dir / "metrics.jsonl")) == 1000
    assert len([row for row in logged_to_wandb(run_dir) if "train/loss" in row]) == 1000  # there to be synced


@pytest.mark.row(26)
def test_a_real_disk_that_is_full_is_one_warning_and_no_crash(run_dir: Path) -> None:
    """RLIMIT_FSIZE: writes beyond it fail in the kernel, as on a full disk."""
    code = f"""
        import resource, signal
        from pathlib import Path
        from types import SimpleNamespace
        from tunesmith.train.config.config import TrackConfig, WandbMode
        from tunesmith.train.track.track import Tracker
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (600, 600))
        config = SimpleNamespace(name="x", track=TrackConfig(wandb=WandbMode.disabled))
        warnings = []
        tracker = Tracker(config, Path({str(run_dir)!r}), resolved={{}}, warn=warnings.append)
        for step in range(1, 101):
            tracker.log(step, {{"train/loss": 1.0}})
        tracker.finish({{"status": "finished"}})
        assert len(warnings) == 1, warnings
        assert "metrics.jsonl cannot be written" in warnings[0]
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)
    lines = (run_dir / "metrics.jsonl").read_bytes().split(b"\n")
    assert 5 < len(lines) < 100
    assert json.loads((run_dir / "summary.json").read_text()) == {"status": "finished"}


@pytest.mark.row(25)
@pytest.mark.usefixtures("online")
def test_an_unreachable_server_is_one_warning_and_an_offline_run(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]  # closed again below: nobody listens
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{port}")
    warnings: list[str] = []
    tracker = open_tracker(run_dir, WandbMode.online, warn=warnings.append)
    tracker.log(1, {"train/loss": 1.0})
    tracker.finish({})
    assert len(warnings) == 1
    assert "logging offline" in warnings[0]
    assert capfd.readouterr() == ("", "")  # W&B itself says nothing
    assert [row["train/loss"] for row in logged_to_wandb(run_dir) if "train/loss" in row] == [1.0]


def test_a_key_of_the_wrong_form_is_one_warning_without_the_key(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "kanarienvogel")
    warnings: list[str] = []
    tracker = open_tracker(run_dir, WandbMode.auto, warn=warnings.append)
    tracker.finish({})
    assert len(warnings) == 1
    assert "logging offline" in warnings[0]
    assert "kanarienvogel" not in warnings[0]


class Broken:
    """A W&B run whose log fails."""

    dir = "/runs/x/wandb/offline-run-1/files"

    def __init__(self) -> None:
        self.calls = 0

    def define_metric(self, *_: object, **__: object) -> None: ...

    def log(self, *_: object, **__: object) -> None:
        self.calls += 1
        raise RuntimeError("disk full\nsecond line")


def test_a_log_that_raises_is_one_warning_and_the_files_go_on(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    broken = Broken()
    monkeypatch.setattr(wandb, "init", lambda **_: broken)
    warnings: list[str] = []
    tracker = open_tracker(run_dir, WandbMode.offline, warn=warnings.append)
    for step in range(1, 6):
        tracker.log(step, {"train/loss": 1.0})
        time.sleep(0.02)
    tracker.finish({"status": "finished"})
    assert broken.calls == 1
    assert len(warnings) == 1
    assert "disk full second line" in warnings[0]
    assert len(rows_of(run_dir / "metrics.jsonl")) == 5
    assert orjson.loads((run_dir / "summary.json").read_bytes()) == {"status": "finished"}


def test_an_init_that_raises_twice_leaves_the_run_without_wandb(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    def fail(**_: object) -> None:
        raise RuntimeError("no service")

    monkeypatch.setattr(wandb, "init", fail)
    warnings: list[str] = []
    tracker = open_tracker(run_dir, WandbMode.offline, warn=warnings.append)
    tracker.log(1, {"train/loss": 1.0})
    tracker.finish({})
    assert len(warnings) == 1
    assert "W&B is off" in warnings[0]
    assert len(rows_of(run_dir / "metrics.jsonl")) == 1


@pytest.mark.parametrize(
    ("wanted", "environment", "mode", "warned"),
    [
        (WandbMode.auto, {}, WandbMode.offline, 0),
        (WandbMode.auto, {"WANDB_API_KEY": "k"}, WandbMode.online, 0),
        (WandbMode.auto, {"WANDB_API_KEY": "k", "WANDB_MODE": "offline"}, WandbMode.offline, 0),
        (WandbMode.auto, {"WANDB_MODE": "disabled"}, WandbMode.disabled, 0),
        (WandbMode.online, {}, WandbMode.offline, 1),
        (WandbMode.online, {"WANDB_API_KEY": "k"}, WandbMode.online, 0),
        (WandbMode.offline, {"WANDB_API_KEY": "k"}, WandbMode.offline, 0),
        (WandbMode.disabled, {"WANDB_API_KEY": "k"}, WandbMode.disabled, 0),
    ],
)
def test_the_mode_follows_the_key(
    wanted: WandbMode, environment: dict[str, str], mode: WandbMode, warned: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    warnings: list[str] = []
    assert track.wandb_mode(TrackConfig(wandb=wanted), warnings.append) is mode
    assert len(warnings) == warned


@pytest.mark.parametrize(("host", "found"), [("api.wandb.ai", True), ("wandb.example", False)])
def test_a_key_in_netrc_counts_for_its_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, host: str, found: bool
) -> None:
    file = tmp_path / "netrc"
    file.write_text(f"machine {host}\n  login user\n  password {'k' * 40}\n")
    file.chmod(0o600)
    monkeypatch.setenv("NETRC", str(file))
    assert track.has_wandb_key() is found
