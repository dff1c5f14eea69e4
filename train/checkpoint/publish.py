"""How rank 0 makes a staged folder a checkpoint, and which older ones it lets go."""

import json
import os
import secrets
import time
from pathlib import Path

from tunesmith.train.config.config import CheckpointConfig
from tunesmith.train.files import durable, manifest
from tunesmith.train.files.background_writer import list_name
from tunesmith.train.files.durable import FileDigest
from tunesmith.train.files.manifest import Identity, Manifest
from tunesmith.train.files.step_folders import published, step_of

VISIBLE_SECONDS = 120.0  # a network file system may show another rank's file that much later (OLMo-core waits as long)
LATEST = "latest.json"


def publish(staged: Path, target: Path, step: int, identity: Identity) -> int:
    """Writes the manifest and gives the folder its name; returns its bytes. Raises OSError or ValueError."""
    deadline = time.monotonic() + VISIBLE_SECONDS
    files: dict[str, FileDigest] = {}
    for rank in range(identity.world_size):
        path = staged / list_name(rank)
        _wait_for(path, None, deadline)
        for name, found in json.loads(path.read_bytes()).items():
            files[name] = FileDigest(**found)
        files[path.name] = durable.digest_of(path)
    for name, digest in files.items():
        _wait_for(staged / name, digest.size, deadline)
    written = Manifest(step, identity, files, manifest.library_versions())
    durable.write_bytes(staged / manifest.NAME, written.to_bytes())
    for folder, _, _ in os.walk(staged, topdown=False):
        durable.sync_folder(Path(folder))
    durable.replace(staged, target)  # fails where another save has published it meanwhile
    return written.num_bytes


def point_to(target: Path, step: int) -> None:
    """Names the newest checkpoint in latest.json. Raises OSError."""
    digest = durable.digest_of(target / manifest.NAME)
    latest = {"step": step, "folder": target.name, "manifest_sha256": digest.sha256}
    durable.write_json(target.parent / LATEST, latest)


def prune(run_dir: Path, settings: CheckpointConfig, *, keep: set[Path | None], best_step: int | None) -> None:
    """Removes the checkpoints that are not to be kept. Raises OSError."""
    every = settings.keep_every_steps
    for path in published(run_dir)[settings.keep_last :]:
        step = step_of(path)
        if path in keep or step == best_step or (every and step % every == 0):
            continue
        removed = path.with_name(f"{path.name}.tmp-{secrets.token_hex(4)}")
        durable.replace(path, removed)  # first: a checkpoint that is half gone must not look like one
        durable.remove_tree(removed)


def _wait_for(path: Path, size: int | None, deadline: float) -> None:
    """Until the file can be seen, with its size. Raises OSError."""
    while True:
        try:
            found = path.stat().st_size
        except FileNotFoundError:
            found = None
        if found is not None and size in (None, found):
            return
        if time.monotonic() > deadline:
            what = "cannot be seen" if found is None else f"has {found} bytes instead of {size}"
            raise OSError(f"{path.name}, which another rank has written, {what}: is the folder shared by all ranks?")
        time.sleep(0.05)
