"""Escape codes in data reach no terminal: every way to the screen, with a text that would drive one."""

import io
import subprocess
import sys
from types import SimpleNamespace

import orjson
import pytest
from rich.console import Console as RichConsole

from tunesmith.launch import chat, supervise
from tunesmith.launch.cluster import job, logs
from tunesmith.launch.sweeping import driver
from tunesmith.train.data.preview import _Record
from tunesmith.train.files.rows import read_rows, write_rows
from tunesmith.train.printable import DRIVING, printable
from tunesmith.train.redact import print_traceback
from tunesmith.train.track.console import Console
from tunesmith.train.watch import failure

# Sets the title, clears the screen (in two spellings), turns the direction, goes back to the start of the line.
HOSTILE = "\x1b]0;owned\x07\x1b[2J\x9b2J\u202eabc\r\x7f é 日本"
SPELLED = "\\u001b]0;owned\\u0007\\u001b[2J\\u009b2J\\u202eabc\\u000d\\u007f é 日本"


def test_what_drives_a_terminal_is_spelled_and_nothing_else():
    assert printable(HOSTILE) == SPELLED
    assert printable("\ud83d") == "\\ud83d"  # half a pair: no encoding can write it
    assert printable("\u061c\u200e\u200f\u2028\u2029") == "\\u061c\\u200e\\u200f\\u2028\\u2029"
    others = "a\tb\nc é 日本 😀 \u200d \xa0"
    assert printable(others) == others
    assert orjson.loads(printable(orjson.dumps(HOSTILE).decode())) == HOSTILE


def on_console(show):
    def way(text):
        with Console(plain=True) as console:
            show(console, text)

    return way


def streamed(text):
    chat._answer(SimpleNamespace(stream=lambda history: iter([text[:1], text[1:]])), [], "q")


def raised(text):
    try:
        raise ValueError(text)
    except ValueError as error:
        print_traceback(error)


WAYS = {
    "print": on_console(lambda console, text: console.print(text)),
    "warn": on_console(lambda console, text: console.warn(text)),
    "error": on_console(lambda console, text: console.error(text)),
    "phase": on_console(lambda console, text: console.phase(text)),
    "table": on_console(lambda console, text: console.start_summary([("name", text)], text)),
    "end": on_console(lambda console, text: console.end([("name", text)], text)),
    "chat": streamed,
    "traceback": raised,
    "last words": failure.say,
    "supervise": supervise.tell,
    "sweep": driver.say,
    "job": job.tell,
}


@pytest.mark.parametrize("way", WAYS)
def test_no_way_to_the_screen_passes_it_on(way, capfd):
    WAYS[way](HOSTILE)
    sys.stdout.flush()
    shown = "".join(capfd.readouterr())
    assert SPELLED in shown
    assert not DRIVING.search(shown)


@pytest.mark.parametrize("options", [{}, {"force_terminal": True, "color_system": "standard", "_environ": {}}])
def test_the_preview_has_no_codes_but_its_colours(options):
    file = io.StringIO()
    RichConsole(file=file, width=300, **options).print(_Record(HOSTILE, [HOSTILE, "x"], [0.0, 1.0]))
    text = file.getvalue()
    for style in ("\x1b[1m", "\x1b[30;42m", "\x1b[30;102m", "\x1b[2m", "\x1b[0m"):
        text = text.replace(style, "")
    assert not DRIVING.search(text)
    assert text.count("owned") == 2


def test_the_live_line_has_no_codes_of_others(capsys):
    with Console(plain=False) as console:
        console.phase(HOSTILE)
        file = io.StringIO()
        RichConsole(file=file, width=300).print(console._render())
    assert SPELLED in file.getvalue()
    assert not DRIVING.search(file.getvalue())


def test_samples_can_be_looked_at_with_cat(tmp_path):
    path = tmp_path / "samples.jsonl"
    write_rows(path, [{"step": 1, "answer": HOSTILE}])
    assert not DRIVING.search(path.read_text(encoding="utf-8"))
    assert read_rows(path) == [{"step": 1, "answer": HOSTILE}]


@pytest.mark.parametrize("is_terminal", [True, False])
def test_logs_are_printable_on_a_terminal_and_whole_elsewhere(is_terminal, monkeypatch, capfdbinary):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: is_terminal)
    line = b"\xff" + HOSTILE.encode() + b"\n"
    logs.LogViewer._write(None, line)
    sys.stdout.flush()
    assert capfdbinary.readouterr().out == (f"\\xff{SPELLED}\n".encode() if is_terminal else line)


FAILS = """
import sys
from tunesmith.launch.arguments import main
from tunesmith.train.errors import DataError
def body(arguments):
    raise DataError(f"{arguments[0]}: bad", at=arguments[0], do=arguments[0])
main(body)
"""


def test_an_error_about_a_record_is_printable():
    done = subprocess.run([sys.executable, "-c", FAILS, HOSTILE], capture_output=True, encoding="utf-8")
    assert done.returncode == 2
    assert done.stderr.count(SPELLED) == 3
    assert not DRIVING.search(done.stderr)
