"""What a file is that is not JSON Lines, told from its first bytes, and how to make JSON Lines of it.

In a remedy <file> stands for its path, <new> for that of the file to be made.
"""

import json
import re

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
MARKUP = re.compile(rb"<(?:!doctype|html|head|body|\?xml|!--)", re.IGNORECASE)
COLUMN = re.compile(rb'"?[\w .\-/]{1,40}"?')  # its name
ROW = re.compile(rb"\s*\{")
OPENED = re.compile(rb'\{\s*(?:"[^"]*"\s*:\s*[\[{]?\s*)?')  # all that the first line of a spread-out object may hold


def foreign_kind(head: bytes) -> tuple[str, str] | None:
    """What a file is whose first bytes these are, and the remedy. None: it may be JSON Lines."""
    for magic, known in MAGIC.items():
        if head.startswith(magic):
            return known
    for order, first in (("LE", 1), ("BE", 0)):
        if len(head) >= 4 and not any(head[first:64:2]) and all(head[1 - first : 64 : 2]):
            return "UTF-16 text without a byte order mark", TO_UTF_8.format(f"UTF-16{order}")
    text = head.removeprefix(BYTE_ORDER_MARK).lstrip()
    if MARKUP.match(text):
        return "a page of HTML or XML", "download the file itself: a page is what a link or a login answers with."
    if text.startswith(b"["):
        return "one JSON array", "jq -c '.[]' <file> > <new>"
    if _is_spread_out(text):
        return "JSON over several lines", "jq -c . <file> > <new>"
    if delimiter := _delimiter(text):
        kind = {",": "CSV", "\t": "tab-separated columns", ";": "CSV with semicolons"}[delimiter]
        return kind, BY_DATASETS.format("csv", f", sep={delimiter!r}".replace("'", '"'))
    return None


def _is_spread_out(text: bytes) -> bool:
    """Whether an object that starts in the first line ends in a later one."""
    first = text.split(b"\n", 1)[0].strip()
    if not first.startswith(b"{"):
        return False
    if OPENED.fullmatch(first):
        return True
    whole = text.decode("utf-8", errors="ignore")
    try:
        _, end = json.JSONDecoder().raw_decode(whole)
    except (ValueError, RecursionError):
        return False
    return "\n" in whole[:end]


def _delimiter(text: bytes) -> str | None:
    """What separates the columns of a table whose first line names them."""
    heading, _, rest = text.partition(b"\n")
    for sign in (",", "\t", ";"):
        cells = heading.strip().split(sign.encode())
        if len(cells) > 1 and all(map(COLUMN.fullmatch, cells)) and sign.encode() in rest and not ROW.match(rest):
            return sign
    return None
