"""data.train and data.validation -> files and hub datasets, and a digest of what is in them."""

import gzip
import hashlib
import io
import shlex
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from glob import glob, has_magic
from pathlib import Path
from typing import Any

from tunesmith.train.data.file_kind import BYTE_ORDER_MARK, GZIP, HEAD_BYTES, foreign_kind
from tunesmith.train.errors import DataError
from tunesmith.train.paths import resolve_path

HUB_SCHEME = "hub:"
SUFFIXES = (".jsonl", ".jsonl.gz")
MAX_LINE_BYTES = 32 * 2**20  # far beyond any context; a longer line is a file that is no JSONL, or a trap
MAX_UNPACKING = 200  # times its size that a .gz file may unpack to: text packs 3 to 20 times, an attack 1000 times
FREE_BYTES = 64 * 2**20  # unpacked, below which that is not asked


@dataclass(frozen=True)
class Source:
    """One file, or one split of a hub dataset."""

    name: str  # as errors name it: the path as the user wrote it, or hub:<dataset id>:<split>
    path: Path | None  # None: a hub dataset
    expected: str | None = None  # the digest of what will be read

    def pinned(self) -> "Source":
        """The same, which from now on must hold what it holds now: reading anything else is an error."""
        return replace(self, expected=self.digest())

    def lines(self) -> Iterator[bytes]:
        """The lines of a file as bytes, without a byte order mark.

        Raises: DataError when they can't be read, when the file is no JSON Lines, and after the last line when what
            was read is not what was expected.
        """
        assert self.path is not None
        try:
            with _DigestedFile(self.path) as raw, io.BufferedReader(raw, HEAD_BYTES) as plain:
                packed = self.path.suffix == ".gz"
                self._check_kind(plain.peek(), packed=packed)
                file = gzip.GzipFile(fileobj=plain) if packed else plain
                if packed:
                    self._check_kind(file.peek(HEAD_BYTES), packed=False)
                number = num_bytes = 0
                while line := file.readline(MAX_LINE_BYTES + 1):
                    number, num_bytes = number + 1, num_bytes + len(line)
                    self._check_size(number, len(line), num_bytes)
                    yield line.removeprefix(BYTE_ORDER_MARK) if number == 1 else line
                self._check_digest(raw.sha256.hexdigest())
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(f"{self.name} can't be read: {error}", at=self.name) from error

    def _check_kind(self, head: bytes, *, packed: bool) -> None:
        """Raises DataError for a file that is no JSON Lines, once for the whole file."""
        if packed and head.startswith(GZIP):
            return
        if kind := foreign_kind(head[:HEAD_BYTES]):
            what, do = kind
            assert self.path is not None
            new = self.path.with_suffix(".new.jsonl")  # never the file itself, which `>` would empty
            do = do.replace("<file>", shlex.quote(str(self.path))).replace("<new>", shlex.quote(str(new)))
            raise DataError(f"{self.name} is {what}, not JSON Lines.", at=self.name, do=do)

    def _check_digest(self, found: str) -> None:
        if self.expected not in (None, found):
            raise DataError(
                f"{self.name} was written to while it was read.",
                at=self.name,
                do="start again when it is complete, or train on a copy.",
            )

    def _check_size(self, number: int, line_bytes: int, num_bytes: int) -> None:
        """Raises DataError for a line, or a packed file, that no memory holds."""
        assert self.path is not None
        if line_bytes > MAX_LINE_BYTES:
            raise DataError(
                f"{self.name}:{number}: the line has more than {MAX_LINE_BYTES // 2**20} MiB.",
                do="write one JSON object a line, each short enough to be trained on.",
            )
        is_packed = self.path.suffix == ".gz" and num_bytes > FREE_BYTES
        if is_packed and num_bytes > MAX_UNPACKING * self.path.stat().st_size:
            raise DataError(
                f"{self.name} unpacks to more than {MAX_UNPACKING} times its size.",
                at=self.name,
                do="unpack it yourself if it is what you think.",
            )

    def rows(self) -> Any:
        """The rows of a hub dataset: a `datasets.Dataset`. Raises DataError when they are not what was expected."""
        _, dataset_id, split = self.name.split(":")
        dataset = _load_dataset(dataset_id, split)
        self._check_digest(f"{self.name} {dataset._fingerprint}")
        return dataset

    def digest(self) -> str:
        """A hash of the content: the file's bytes, or the fingerprint that `datasets` keeps."""
        if self.path is None:
            return f"{self.name} {self.rows()._fingerprint}"
        try:
            with self.path.open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise DataError(f"{self.name} can't be read: {error}", at=self.name) from error


class _DigestedFile(io.RawIOBase):
    """A file that is digested as it is read."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb", buffering=0)
        self.sha256 = hashlib.sha256()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        size = self._file.readinto(buffer) or 0
        self.sha256.update(memoryview(buffer)[:size])
        return size

    def close(self) -> None:
        self._file.close()
        super().close()


def find_sources(names: list[str]) -> list[Source]:
    """Files, folders (their .jsonl and .jsonl.gz files), globs and hub datasets, in a fixed order.

    Raises: DataError when there is nothing under a name, or when a file comes twice.
    """
    sources = [source for name in names for source in _find(name)]
    seen: set[Path | str] = set()
    for source in sources:
        identity = source.path.resolve() if source.path else source.name
        if identity in seen:
            raise DataError(f"{source.name} is given twice.", at=source.name, do="list every file once.")
        seen.add(identity)
    return sources


def _find(name: str) -> list[Source]:
    if name.startswith(HUB_SCHEME):
        parts = name.removeprefix(HUB_SCHEME).split(":")
        if len(parts) > 2 or not all(parts):
            raise DataError(
                f"{name} is not a hub dataset.", at=name, do="write hub:<dataset id> or hub:<dataset id>:<split>."
            )
        return [Source(f"{HUB_SCHEME}{parts[0]}:{parts[1] if len(parts) == 2 else 'train'}", None)]
    path = Path(resolve_path(name))
    if path.is_dir():
        found = sorted(file for file in path.iterdir() if file.name.endswith(SUFFIXES) and file.is_file())
        if not found:
            raise DataError(
                f"the folder {name} holds no .jsonl or .jsonl.gz file.", at=name, do="name the folder the files lie in."
            )
        return [Source(str(file), file) for file in found]
    if path.is_file():
        return [Source(name, path)]
    folder = next((parent for parent in path.parents if parent.is_dir()), Path())  # whose name may have brackets
    pattern = str(path.relative_to(folder))
    if has_magic(pattern):
        found = sorted(folder / file for file in glob(pattern, root_dir=folder, recursive=True))
        found = [file for file in found if file.is_file()]
        if not found:
            raise DataError(f"no file matches {name}.", at=name, do=f"relative paths start at {Path.cwd()}.")
        return [Source(str(file), file) for file in found]
    several = " Several files are written [one,two]." if "," in name else ""
    raise DataError(
        f"there is no file or folder {name}.", at=name, do=f"relative paths start at {Path.cwd()}.{several}"
    )


def _load_dataset(dataset_id: str, split: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"hub:{dataset_id} needs the datasets library.", at=dataset_id, do="pip install 'tunesmith[hub]'."
        ) from error
    try:
        return datasets.load_dataset(dataset_id, split=split)
    except Exception as error:  # the hub's client, the network and a dataset's files raise all kinds
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"hub:{dataset_id}:{split} can't be loaded: {first_line}",
            at=f"hub:{dataset_id}:{split}",
            do="check the id and the split; a gated dataset needs HF_TOKEN, and the first use the internet.",
        ) from error
