"""The whole state of a run, saved and resumed.

<run>/checkpoints/step-000100/
    engine/            DeepSpeed's shards: weights, optimizer state, loss scale (adapter runs leave frozen weights out)
    rank-00000.safetensors and .json   random-number state of each rank
    state.json         counters of the loop
    MANIFEST.json      written last: what must be there, with sizes; a folder without it is not a checkpoint

A save is staged in a folder of another name and renamed by rank 0 once every rank has written its part.
"""

import json
import os
import random
import re
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from tunesmith.train import distributed
from tunesmith.train.distributed import World
from tunesmith.train.errors import TrainingError
from tunesmith.train.run_folder import write_json
from tunesmith.train.state import RunState

if TYPE_CHECKING:
    from tunesmith.train.engine import Engine

STEP_FOLDER = re.compile(r"step-(\d{6,})$")


class Checkpoints:
    """The checkpoints of one run folder."""

    def __init__(self, run_dir: Path, *, keep_last: int, fingerprint: dict[str, object], world: World) -> None:
        self.folder = run_dir / "checkpoints"
        self._keep_last = keep_last
        self._fingerprint = fingerprint
        self._world = world

    def save(self, engine: "Engine", state: RunState) -> Path:
        """Writes the state after state.step steps. Every rank calls it; raises TrainingError when one cannot write."""
        target = self.folder / f"step-{state.step:06d}"
        if target.exists():
            return target
        staged = self.folder / f".staged-step-{state.step:06d}"
        if self._world.rank == 0:
            shutil.rmtree(staged, ignore_errors=True)
            staged.mkdir(parents=True)
        distributed.barrier()
        problem = ""
        try:
            engine.save(staged)
            _save_random_state(staged, self._world.rank)
        except (OSError, RuntimeError, SafetensorError) as error:  # each library has its own for a full disk
            problem = str(error).splitlines()[0]
        if not distributed.all_ranks(not problem, engine.device):
            shutil.rmtree(staged, ignore_errors=True)
            raise TrainingError(
                f"a checkpoint could not be written. {problem}",
                at=str(target),
                do="free space there; older checkpoints are whole.",
            )
        try:
            if self._world.rank == 0:
                self._publish(staged, target, state)
        except OSError as error:
            problem = str(error)
        if not distributed.all_ranks(not problem, engine.device):
            raise TrainingError(f"a checkpoint could not be put in place. {problem}", at=str(target))
        return target

    def _publish(self, staged: Path, target: Path, state: RunState) -> None:
        write_json(staged / "state.json", asdict(state))
        sizes = {str(f.relative_to(staged)): f.stat().st_size for f in sorted(staged.rglob("*")) if f.is_file()}
        manifest = {"format": 1, "step": state.step, "fingerprint": self._fingerprint, "files": sizes}
        write_json(staged / "MANIFEST.json", manifest)
        os.replace(staged, target)
        self._prune(state.best_step)

    def _prune(self, best_step: int | None) -> None:
        kept = set(self.steps()[-self._keep_last :]) | {best_step}
        for step in self.steps():
            if step not in kept:
                shutil.rmtree(self.folder / f"step-{step:06d}")

    def steps(self) -> list[int]:
        """Steps with a complete checkpoint, oldest first."""
        if not self.folder.is_dir():
            return []
        found = [(STEP_FOLDER.match(path.name), path) for path in self.folder.iterdir()]
        return sorted(int(match[1]) for match, path in found if match and (path / "MANIFEST.json").is_file())

    def newest(self) -> Path | None:
        steps = self.steps()
        return self.folder / f"step-{steps[-1]:06d}" if steps else None

    def load(self, engine: "Engine", path: Path) -> RunState:
        """Restores engine, random numbers and counters from one checkpoint. Every rank calls it."""
        check(path, self._fingerprint)
        engine.load(path)
        _load_random_state(path, self._world.rank)
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        return RunState(**state)


def find(resume: str, run_dir: Path) -> Path | None:
    """The checkpoint to go on from: auto looks in the run folder; a path is a checkpoint or a run folder.

    Raises TrainingError when a path leads to none.
    """
    if resume == "never":
        return None
    root = run_dir if resume == "auto" else Path(resume).expanduser()
    if (root / "MANIFEST.json").is_file():
        return root
    newest = Checkpoints(root, keep_last=1, fingerprint={}, world=World()).newest()
    if newest is None and resume != "auto":
        raise TrainingError(
            "there is no checkpoint.", at=resume, do="give a run folder or one of its checkpoints/step-*."
        )
    return newest


def check(path: Path, fingerprint: dict[str, object]) -> None:
    """Raises TrainingError when files are missing or cut short, or the checkpoint is of another run."""
    try:
        manifest = json.loads((path / "MANIFEST.json").read_text(encoding="utf-8"))
        sizes, saved = manifest["files"], manifest["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TrainingError(
            f"MANIFEST.json cannot be read ({type(error).__name__}).", at=str(path), do="remove this checkpoint."
        ) from None
    for name, size in sizes.items():
        file = path / name
        if not file.is_file() or file.stat().st_size != size:
            raise TrainingError(
                f"{name} is missing or cut short.",
                at=str(path),
                do="remove this checkpoint; the one before it will be used.",
            )
    for key, value in fingerprint.items():
        if saved.get(key) != value:
            raise TrainingError(
                f"the checkpoint was made with {key}={saved.get(key)}, this run has {key}={value}.",
                at=str(path),
                do=f"set {key} back, or start anew with resume=never and another output_dir.",
            )


def _save_random_state(folder: Path, rank: int) -> None:
    """Per rank and outside DeepSpeed's client state, which keeps only rank 0's under ZeRO 1 and 2."""
    name, keys, position, has_gauss, gauss = np.random.get_state()
    tensors = {
        "torch": torch.get_rng_state(),
        "numpy": torch.from_numpy(np.asarray(keys, dtype=np.uint32).view(np.int32).copy()),
    }
    if torch.cuda.is_initialized():
        tensors["cuda"] = torch.cuda.get_rng_state()
    save_file(tensors, folder / f"rank-{rank:05d}.safetensors")
    numpy_rest = {"name": str(name), "position": int(position), "has_gauss": int(has_gauss), "gauss": float(gauss)}
    write_json(folder / f"rank-{rank:05d}.json", {"python": random.getstate(), "numpy": numpy_rest})


def _load_random_state(folder: Path, rank: int) -> None:
    tensors = load_file(folder / f"rank-{rank:05d}.safetensors")
    rest = json.loads((folder / f"rank-{rank:05d}.json").read_text(encoding="utf-8"))
    version, internal, gauss = rest["python"]
    random.setstate((version, tuple(internal), gauss))
    numpy_rest = rest["numpy"]
    keys = tensors["numpy"].numpy().view(np.uint32)
    np.random.set_state(
        (numpy_rest["name"], keys, numpy_rest["position"], numpy_rest["has_gauss"], numpy_rest["gauss"])
    )
    torch.set_rng_state(tensors["torch"])
    if "cuda" in tensors and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(tensors["cuda"])
