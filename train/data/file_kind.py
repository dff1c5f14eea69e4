"""What a file is that is not JSON Lines, told from its first bytes, and how to make JSON Lines of it.

In a remedy <file> stands for its path, <new> for that of the file to be made.
"""

import codecs
import csv
import json
import re
import shlex
import unicodedata
from contextlib import suppress
from typing import Any

HEAD_BYTES = 1 << 16  # that are looked at
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
GZIP = b"\x1f\x8b"
UNPACK = "unpack it, and give the .jsonl file in it."
TO_UTF_8 = "iconv -f {} -t UTF-8 <file> > <new>"
BY_DATASETS = (  # of the `hub` extra
    "python -c 'import sys, datasets; datasets.Dataset.from_{}(sys.argv[1]{}).to_json(sys.argv[2])' <file> <new>"
)
# First bytes -> what the file is, and the remedy. UTF-32's mark begins with UTF-16's, so it comes first.
MAGIC = {
    b"version https://git-lfs.github.com/spec/": ("the pointer that git LFS keeps in place of a file", "git lfs pull"),
    GZIP: ("compressed with gzip", "give it a name that ends in .jsonl.gz, or unpack it."),
    b"PK\x03\x04": ("a zip archive, or an office document", UNPACK),
    b"\x28\xb5\x2f\xfd": ("compressed with zstd", UNPACK),
    b"BZh": ("compressed with bzip2", UNPACK),
    b"\xfd7zXZ\x00": ("compressed with xz", UNPACK),
    b"7z\xbc\xaf\x27\x1c": ("a 7z archive", UNPACK),
    b"PAR1": ("a Parquet file", BY_DATASETS.format("parquet", "")),
    b"ARROW1": ("an Arrow file", "write its rows as JSON, one object a line."),
    b"SQLite format 3\x00": ("a SQLite database", "write its rows as JSON, one object a line."),
    b"%PDF-": ("a PDF document", "give a file with one JSON object a line."),
    b"\xff\xfe\x00\x00": ("UTF-32 text", TO_UTF_8.format("UTF-32")),
    b"\x00\x00\xfe\xff": ("UTF-32 text", TO_UTF_8.format("UTF-32")),
    b"\xff\xfe": ("UTF-16 text", TO_UTF_8.format("UTF-16")),
    b"\xfe\xff": ("UTF-16 text", TO_UTF_8.format("UTF-16")),
}
MARKUP = re.compile(rb"<[!?/]?[a-z][^<>|]*>", re.IGNORECASE)
COLUMNS = {",": "CSV", "\t": "tab-separated columns", ";": "CSV with semicolons", "|": "columns separated by |"}
LINES = 20  # that are looked at
MAX_NAME = 60  # characters of a column's
OPENED = re.compile(rb'\{\s*(?:"[^"]*"\s*:\s*[\[{]?\s*)?')  # all that the first line of a spread-out object may hold
HOLDER = re.compile(rb'"([^"\\]+)"\s*:\s*\[\s*\{')  # a field that holds a list of objects
OF_A_ROW = {"messages", "tools", "prompt", "completion", "conversations", "conversation", "history", "functions"}


def foreign_kind(head: bytes) -> tuple[str, str] | None:
    """What a file is whose first bytes these are, and the remedy. None: it may be JSON Lines."""
    for magic, known in MAGIC.items():
        if head.startswith(magic):
            return known
    if head[257:262] == b"ustar":
        return "a tar archive", UNPACK
    if order := _utf_16(head):
        return "UTF-16 text without a byte order mark", TO_UTF_8.format(f"UTF-16{order}")
    text = head.removeprefix(BYTE_ORDER_MARK).lstrip()
    if text.startswith(b"["):
        return _arrays(text)
    if _is_spread_out(text):
        return "JSON over several lines", f"jq -c {_rows_of(text)} <file> > <new>"
    lines = [line for line in text.split(b"\n")[:LINES] if line.strip()]
    values = [_parsed(line) for line in lines]
    if not lines or any(isinstance(value, dict) for value in values):
        return None
    if MARKUP.match(text):
        return "a page of HTML or XML", "download the file itself: a page is what a link or a login answers with."
    if any(value is not None or line.lstrip().startswith(b"{") for line, value in zip(lines, values, strict=True)):
        return None  # bad rows, each with its own fault
    if sign := _delimiter(text):
        return COLUMNS[sign], BY_DATASETS.format("csv", f", sep={sign!r}".replace("'", '"'))
    if b"\n" not in text:  # one bad row, or one too long
        return None
    return "binary data" if b"\0" in text else "text", "give a file with one JSON object a line."


def _utf_16(head: bytes) -> str | None:
    """The byte order of text in which something (a quote, a comma, a line's end) is ASCII, thus has a byte of 0."""
    if b"\0" not in head or (head.lstrip()[:1] in (b"{", b"[") and head.lstrip()[1:2] != b"\0"):
        return None
    order = "LE" if head[1::2].count(0) > head[::2].count(0) else "BE"
    try:
        text = codecs.getincrementaldecoder(f"utf-16-{order}")().decode(head)  # the last character may be cut
    except UnicodeDecodeError:
        return None
    is_text = bool({"\n", '"'} & set(text)) and all(
        sign.isspace() or unicodedata.category(sign) not in ("Cc", "Cn", "Co") for sign in text
    )
    return order if is_text else None


def _arrays(text: bytes) -> tuple[str, str]:
    first, _, rest = text.partition(b"\n")
    array = _parsed(first)
    if not isinstance(array, list) or not rest.lstrip().startswith(b"["):
        return "one JSON array", "jq -c '.[]' <file> > <new>"
    if array and all(isinstance(item, dict) for item in array):
        rows = "{messages: .}" if "role" in array[0] else ".[]"
        return "a JSON array on each line", f"jq -c '{rows}' <file> > <new>"
    return "a JSON array on each line", "jq -c '{prompt: .[0], completion: .[1]}' <file> > <new>"


def _is_spread_out(text: bytes) -> bool:
    """Whether an object that starts in the first line ends in a later one, or is not at its end where the text is."""
    first = text.split(b"\n", 1)[0].strip()
    if not first.startswith(b"{"):
        return False
    if OPENED.fullmatch(first):
        return True
    if first.endswith(b":"):  # a row that was cut off
        return False
    whole = text.decode("utf-8", errors="ignore").strip()
    try:
        _, end = json.JSONDecoder().raw_decode(whole)
    except json.JSONDecodeError as error:
        is_cut = error.msg.startswith("Unterminated string") or error.pos >= len(whole) - len("\\uxxxx")
        return is_cut and "\n" in whole
    except RecursionError:
        return False
    return "\n" in whole[:end]


def _rows_of(text: bytes) -> str:
    """For jq, what of a spread-out object is rows: it, or what one of its fields lists."""
    holder = HOLDER.search(text)
    if holder is None or any(f'"{name}"'.encode() in text[: holder.end()] for name in OF_A_ROW):
        return "."
    name = holder[1].decode("utf-8", errors="replace")
    return shlex.quote(f".{name}[]" if re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII) else f'."{name}"[]')


def _parsed(line: bytes) -> Any:
    """Its JSON; None for what is none."""
    with suppress(ValueError, RecursionError):
        return json.loads(line)
    return None


def _delimiter(text: bytes) -> str | None:
    """What separates the columns of a table whose first line names them: there is as much of it in every row."""
    lines = text.decode("utf-8", errors="replace").splitlines(keepends=True)
    for sign in sorted(COLUMNS, key=lines[0].count, reverse=True):
        with suppress(csv.Error):
            rows = [row for row in csv.reader(lines, delimiter=sign) if row]
            names, cells = (
                rows[0],
                rows[1:LINES] if len(rows) > LINES else rows[1:-1] or rows[1:],
            )  # the last may be cut
            if len(names) > 1 and cells and all(len(row) == len(names) for row in cells):
                return sign if all(len(name) <= MAX_NAME for name in names) else None
    return None
