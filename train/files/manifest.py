"""MANIFEST.json: what a checkpoint is and which bytes it is made of. Without one, a folder is none."""

import hashlib
import json
import math
from dataclasses import MISSING, asdict, dataclass, field, fields
from importlib.metadata import version
from pathlib import Path, PurePosixPath
from typing import Any

from tunesmith.train.files.durable import FileDigest, json_bytes

NAME = "MANIFEST.json"
FORMAT_VERSION = 3  # raise it when older code cannot read what this code writes
FORMATS_READ = (2, FORMAT_VERSION)  # 2 names four more things of the run, which nothing compares
LIBRARIES = ("torch", "deepspeed", "transformers", "peft", "numpy")


class ManifestError(Exception):
    """What is wrong with a manifest, in a few words."""


class OtherFormat(ManifestError):
    """Nothing is wrong with it: another version of this code wrote it, and reads it."""


@dataclass(frozen=True)
class Identity:
    """The run that a checkpoint is of: what must agree (fingerprint), and what the files were laid out for.

    The fingerprint is compared key by key; a run on other ranks or at another ZeRO stage reshapes the files.
    """

    fingerprint: dict[str, Any]
    noted: dict[str, Any]  # settings that may change, with a line that says so
    world_size: int
    layout: dict[str, Any]  # all that decides how the engine's files are cut (zero/universal.py)
    data: dict[str, str] = field(default_factory=dict)  # what the data's fingerprint is made of, to say what differs

    @classmethod
    def from_tree(cls, tree: dict[str, Any]) -> "Identity":
        """As it was written with asdict(), by this version or an older one. Raises KeyError, TypeError."""
        return cls(**{it.name: tree[it.name] for it in fields(cls) if it.name in tree or it.default_factory is MISSING})


@dataclass(frozen=True)
class Manifest:
    step: int
    identity: Identity
    files: dict[str, FileDigest]  # name below the folder, with slashes -> what it must be
    versions: dict[str, str]

    @property
    def num_bytes(self) -> int:
        return sum(digest.size for digest in self.files.values())

    def to_bytes(self) -> bytes:
        """The file. Its own digest stands in it, over everything else."""
        tree = plain({"format": FORMAT_VERSION, **asdict(self)})
        return json_bytes(tree | {"sha256": _digest(tree)})


def library_versions() -> dict[str, str]:
    return {name: version(name) for name in LIBRARIES}


def read_manifest(folder: Path) -> Manifest:
    """Raises ManifestError unless the file is, byte for byte, one that to_bytes() gave; OSError where it can't be read.

    A manifest that cannot be read says nothing about the checkpoint: it may be read tomorrow.
    """
    try:
        written = (folder / NAME).read_bytes()
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        raise ManifestError(f"{NAME} is missing") from None
    return parse_manifest(written)


def parse_manifest(written: bytes) -> Manifest:
    """Raises ManifestError, as read_manifest()."""
    try:
        tree = json.loads(written)
        digest, found_format = tree.pop("sha256"), tree["format"]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ManifestError(f"{NAME} is damaged") from None
    if digest != _digest(tree) or written != json_bytes(tree | {"sha256": digest}):
        raise ManifestError(f"{NAME} is damaged: its own digest does not fit")
    if found_format not in FORMATS_READ:
        read = " and ".join(map(str, FORMATS_READ))
        raise OtherFormat(f"its format is {found_format}, and this Tunesmith reads formats {read}")
    try:
        return _from_tree(tree)
    except (KeyError, TypeError, ValueError):
        raise ManifestError(f"{NAME} lacks what it must hold") from None


def _from_tree(tree: dict[str, Any]) -> Manifest:
    files = {str(name): FileDigest(int(found["size"]), str(found["sha256"])) for name, found in tree["files"].items()}
    for name in files:
        parts = PurePosixPath(name).parts
        if not parts or name.startswith("/") or ".." in parts or "\0" in name:
            raise ValueError(name)  # it would lead out of the checkpoint
    return Manifest(int(tree["step"]), Identity.from_tree(tree["identity"]), files, dict(tree["versions"]))


def _digest(tree: dict[str, Any]) -> str:
    return hashlib.sha256(json_bytes(tree)).hexdigest()


def plain(tree: Any) -> Any:
    """A tree as it will be read back from a manifest: keys are texts, tuples lists, infinite numbers texts."""
    if isinstance(tree, dict):
        return {str(key): plain(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [plain(value) for value in tree]
    if isinstance(tree, float) and not math.isfinite(tree):
        return str(tree)
    return tree if isinstance(tree, bool | int | float | type(None)) else str(tree)
