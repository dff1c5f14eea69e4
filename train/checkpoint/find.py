"""The checkpoint to go on from: the newest that is whole, one's own, and of the same run. Damaged ones are set aside.

Every rank takes part: rank 0 looks at names, owners, the manifest and sizes, then each digests its share of the files.
A run that has checkpoints and cannot use any is refused: starting over without a word would be the worst answer.
"""

import contextlib
import json
import os
import secrets
import shlex
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tunesmith.train.config.config import ResumeConfig
from tunesmith.train.errors import TrainingError
from tunesmith.train.files import durable, manifest
from tunesmith.train.files.manifest import Manifest, ManifestError, OtherFormat
from tunesmith.train.files.step_folders import FOLDER, STALE, STEP_FOLDER, published, step_of
from tunesmith.train.paths import user_path
from tunesmith.train.ranks.distributed import World, broadcast_text, first_problem

OWNER = "owner"  # in resume.allow
UNREADABLE = "mend that and start again: the checkpoints stay as they are."
Warn = Callable[[str], None]


@dataclass(frozen=True)
class FoundCheckpoint:
    """A checkpoint that is whole."""

    path: Path
    manifest: Manifest


class Untrusted(Exception):
    """A checkpoint that somebody else may have written."""


def check_source(resume: ResumeConfig, run_dir: Path) -> None:
    """Raises TrainingError when a folder that was named holds no checkpoint. Quick: before anything is loaded."""
    if resume.source not in ("auto", "never"):
        _candidates(resume, run_dir)


def choose(
    resume: ResumeConfig, run_dir: Path, world: World, device: torch.device, warn: Warn
) -> FoundCheckpoint | None:
    """The checkpoint to go on from; None for a run that starts. Every rank calls it, and gets the same.

    Raises TrainingError when there are checkpoints and none can be used, or the one that was named cannot.
    """
    if resume.source == "never":
        return None
    in_run_dir = resume.source == "auto"
    listed = _on_rank_0(lambda: [str(path) for path in _candidates(resume, run_dir)], world, device)
    reasons = []
    for path in map(Path, listed):
        found, problem = _examine(path, OWNER in resume.allow, world, device, warn)
        if found is not None:
            return found
        reasons.append(f"{path.name}: {problem}")
        if not in_run_dir and _is_one(user_path(resume.source)):
            raise _refusal(f"the checkpoint cannot be used. {problem}.", path, "name another checkpoint.")
        new_name = _on_rank_0(lambda: _set_aside(path) if in_run_dir else "", world, device)  # noqa: B023
        kept = f", kept as {new_name}" if new_name else ""
        warn(f"checkpoint {path.name} is not used: {problem}{kept}; looking at the one before it")
    aside = _on_rank_0(lambda: _set_aside_before(run_dir) if in_run_dir else [], world, device)
    if not reasons and not aside:
        return None
    raise _refusal(
        f"there are checkpoints, and none of them is whole ({'; '.join(reasons or aside)[:300]}). "
        "Starting over would throw away what they hold, so nothing was started.",
        (run_dir if in_run_dir else Path(resume.source)) / FOLDER,
        "bring back a whole one from a backup, go on from another run with resume.source=<run folder> and a new "
        "output_dir, or start anew with another output_dir.",
    )


def remove_stale(run_dir: Path) -> None:
    """Removes what saves have left that were never finished. Only for rank 0, while it holds the run's lock.

    Renamed first: an older attempt that still runs somewhere must not publish what is half removed (fence.py).
    """
    folder = run_dir / FOLDER
    for path in folder.iterdir() if folder.is_dir() else []:
        if STALE.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
            unnamed = path.with_name(f"{path.name.partition('.')[0]}.tmp-{secrets.token_hex(4)}")
            with contextlib.suppress(FileNotFoundError):  # the older attempt was faster, and has published it whole
                durable.replace(path, unnamed)
                durable.remove_tree(unnamed)


def set_aside_after(run_dir: Path, step: int) -> list[str]:
    """Renames the checkpoints of later steps; names those that it could not. Rank 0 only."""
    later = [path for path in published(run_dir) if step_of(path) > step]
    return [path.name for path in later if not _set_aside(path)]


def make_way(path: Path) -> tuple[bool, str]:
    """Whether a whole checkpoint is there, and why another cannot be put in its place. Rank 0 only, before a save.

    A damaged one is set aside; a start may have come before without being able to.
    """
    if not path.exists():
        return False, ""
    try:
        written = manifest.read_manifest(path)
        _check_files(path, written)
        damaged, unreadable = _check_digests(FoundCheckpoint(path, written), World())
    except (ManifestError, OSError) as error:
        damaged, unreadable = str(error), ""
    if not damaged and not unreadable:
        return True, ""
    return False, "" if _set_aside(path) else f"{path.name} is there, cannot be used and not be renamed"


def _candidates(resume: ResumeConfig, run_dir: Path) -> list[Path]:
    if resume.source == "auto":
        return published(run_dir)
    named = user_path(resume.source)
    found = [named] if _is_one(named) else published(named)
    if not found and not _set_aside_before(named):
        raise TrainingError(
            "there is no checkpoint.",
            at=str(named),
            do="set resume.source to a run folder or one of its checkpoints/step-*.",
        )
    return found


def _is_one(path: Path) -> bool:
    return (path / manifest.NAME).exists() or (path.is_dir() and STEP_FOLDER.fullmatch(path.name) is not None)


def _set_aside_before(run_dir: Path) -> list[str]:
    folder = run_dir / FOLDER
    return sorted(path.name for path in folder.glob("step-*.bad-*")) if folder.is_dir() else []


def _set_aside(path: Path) -> str:
    """Renames a checkpoint so that it is not taken for one again; empty where that cannot be done."""
    number = 1
    while (target := path.with_name(f"{path.name}.bad-{number}")).exists():
        number += 1
    try:
        durable.replace(path, target)
    except OSError:
        return ""
    return target.name


def _on_rank_0(ask: Callable[[], object], world: World, device: torch.device) -> Any:
    """What rank 0 finds, on every rank; its TrainingError too."""
    answer: dict[str, Any] = {}
    if world.rank == 0:
        try:
            answer = {"found": ask()}
        except TrainingError as error:
            answer = {"error": [error.what, error.at, error.do]}
        except OSError as error:
            where = None if error.filename is None else str(error.filename)
            answer = {"error": [f"the checkpoints cannot be read: {error.strerror}.", where, UNREADABLE]}
    answer = json.loads(broadcast_text(json.dumps(answer), device))
    if "error" in answer:
        what, at, do = answer["error"]
        raise TrainingError(what, at=at, do=do)
    return answer["found"]


def _examine(
    path: Path, any_owner: bool, world: World, device: torch.device, warn: Warn
) -> tuple[FoundCheckpoint | None, str]:
    """The checkpoint, or what is damaged in it.

    Raises TrainingError for one that is not to be trusted, or of which this start cannot tell: it stays as it is.
    """

    def look() -> list[str]:
        try:
            note = _check_owner(path, any_owner)
            _check_files(path, manifest.read_manifest(path))
            return ["", note, (path / manifest.NAME).read_text(encoding="utf-8")]
        except OtherFormat as error:
            raise _refusal(
                f"the checkpoint is of another version of Tunesmith: {error}.",
                path,
                "go on with the version that wrote it, or start anew with another output_dir.",
            ) from None
        except (ManifestError, FileNotFoundError) as error:
            return [str(error), "", ""]
        except Untrusted as error:
            raise _refusal(
                f"{error}, so somebody else may have written it.",
                path,
                "take it over (chown, chmod go-w), or say that you trust it with resume.allow=[owner].",
            ) from None

    problem, note, text = _on_rank_0(look, world, device)
    if problem:
        return None, problem
    if note:
        warn(note)
    found = FoundCheckpoint(path, manifest.parse_manifest(text.encode()))
    damaged, unreadable = _check_digests(found, world)
    if problem := first_problem(unreadable, device):
        raise _refusal(f"the checkpoint cannot be read. {problem}.", path, UNREADABLE)
    if problem := first_problem(damaged, device):
        return None, problem.partition(": ")[2] if world.world_size > 1 else problem
    hostile = first_problem(_check_types(found, world), device)
    if hostile:
        raise _refusal(f"{hostile}, which could run code; nothing of it was run.", path, "do not use this checkpoint.")
    return found, ""


def _check_owner(path: Path, any_owner: bool) -> str:
    """Raises Untrusted where others own or may write the checkpoint; returns a warning for a group that may."""
    group = ""
    for entry in [path, *sorted(path.rglob("*"))]:
        found = entry.lstat()
        if stat.S_ISLNK(found.st_mode) or not (stat.S_ISDIR(found.st_mode) or stat.S_ISREG(found.st_mode)):
            raise Untrusted(f"{entry.name} is a link or a special file")
        if any_owner:
            continue
        if found.st_uid not in (os.geteuid(), 0):
            raise Untrusted(f"{entry.name} belongs to user {found.st_uid}, not to you ({os.geteuid()})")
        if found.st_mode & stat.S_IWOTH:
            raise Untrusted(f"{entry.name} may be written by anybody")
        if found.st_mode & stat.S_IWGRP and not group:
            group = f"checkpoint {path.name} may be written by its group (chmod -R g-w {shlex.quote(str(path))})"
    return group


def _check_files(path: Path, written: Manifest) -> None:
    """Raises ManifestError for a file that is missing, of another size, or one too many."""
    for name, digest in written.files.items():
        try:
            found = (path / name).stat()
        except (FileNotFoundError, NotADirectoryError):
            raise ManifestError(f"{name} is missing") from None
        if not stat.S_ISREG(found.st_mode):
            raise ManifestError(f"{name} is no file")
        if found.st_size != digest.size:
            raise ManifestError(f"{name} has {found.st_size} bytes instead of {digest.size}")
    there = {file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()}
    extra = sorted(there - set(written.files) - {manifest.NAME})
    if extra:  # DeepSpeed takes what it finds by pattern
        raise ManifestError(f"{extra[0]} does not belong to it")


def _check_digests(found: FoundCheckpoint, world: World) -> tuple[str, str]:
    """What is damaged in this rank's share, and what of it cannot be read."""
    for name, digest in _share(found, world):
        try:
            same = durable.digest_of(found.path / name) == digest
        except OSError as error:  # also a file that rank 0 has just seen: this rank sees another folder
            return "", f"{name}: {error.strerror}"
        if not same:
            return f"{name} is damaged: its digest does not fit", ""
    return "", ""


def _check_types(found: FoundCheckpoint, world: World) -> str:
    # Here, as it loads DeepSpeed, which picks its accelerator then.
    from tunesmith.train.zero.checkpoint_engine import foreign_types

    for name, _ in _share(found, world):
        if name.endswith(".pt") and (types := foreign_types(found.path / name)):
            return f"{name} holds {', '.join(types)}"
    return ""


def _share(found: FoundCheckpoint, world: World) -> list[tuple[str, durable.FileDigest]]:
    """Every world_size-th file, by size: the large ones are spread over the ranks."""
    by_size = sorted(found.manifest.files.items(), key=lambda item: (-item[1].size, item[0]))
    return by_size[world.rank :: world.world_size]


def _refusal(what: str, at: Path, do: str) -> TrainingError:
    return TrainingError(what, at=str(at), do=do)
