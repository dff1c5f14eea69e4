"""DeepSpeed's files: written once, hashed on the way to a disk that has them for certain; read without running code."""

from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import torch
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointCommitInfo, CheckpointEngine

from tunesmith.train.errors import TrainingError
from tunesmith.train.files.background_writer import RankFiles
from tunesmith.train.files.host_copy import host_copy
from tunesmith.train.zero.shards import ALLOWED


def allowed_types() -> AbstractContextManager[None]:
    """Inside, torch.load(weights_only=True) takes the few types of DeepSpeed's that may be there, and no others."""
    return torch.serialization.safe_globals([resolve_name(name) for _, name in ALLOWED])


def foreign_types(path: Path) -> list[str]:
    """What a file would bring in besides tensors and the allowed types. Runs nothing of it and reads no tensor."""
    try:
        with allowed_types():
            return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception as error:  # torch has no one kind for a file that is not as it writes them
        return [f"something that is no checkpoint of torch ({str(error).splitlines()[0][:80]})"]


def load_plain(path: str | Path, map_location: Any = "cpu") -> Any:
    """The content of one of DeepSpeed's files. Raises TrainingError when it holds more than plain values."""
    if found := foreign_types(Path(path)):
        raise TrainingError(
            f"{Path(path).name} holds {', '.join(found)}, which could run code; nothing of it was run.",
            at=str(path),
            do="do not use this checkpoint; somebody has put that there.",
        )
    with allowed_types():
        return torch.load(path, map_location=map_location, weights_only=True)


class EngineFiles(CheckpointEngine):
    """What DeepSpeed calls to write and read. save() leaves the writing to `rank_files`."""

    def __init__(self) -> None:
        super().__init__()
        self.name = "tunesmith"
        self.rank_files: RankFiles | None = None

    def create(self, info: CheckpointCommitInfo) -> None:
        pass

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        assert self.rank_files is not None
        self.rank_files.add_folder(Path(path))

    def save(self, state_dict: Any, path: str) -> None:
        assert self.rank_files is not None
        tree = host_copy(state_dict) if self.rank_files.background else state_dict
        self.rank_files.add(Path(path), partial(torch.save, tree))

    def load(self, path: str, map_location: Any = None) -> Any:
        return load_plain(path, map_location)

    def commit(self, info: CheckpointCommitInfo) -> bool:
        return True
