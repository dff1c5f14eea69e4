"""Where checkpoints lie in a run folder, and which are there. No torch: a supervisor and a job's driver look too."""

import re
from pathlib import Path

from tunesmith.train.files import manifest

FOLDER = "checkpoints"  # in the run folder
STEP_FOLDER = re.compile(r"step-([0-9]{6,15})")
STALE = re.compile(rf"{STEP_FOLDER.pattern}\.tmp-[0-9a-f]+")  # of a save that was never finished


def step_folder(run_dir: Path, step: int) -> Path:
    return run_dir / FOLDER / f"step-{step:06d}"


def step_of(path: Path) -> int:
    """The step of a checkpoint's folder."""
    return int(path.name.removeprefix("step-"))


def published(run_dir: Path) -> list[Path]:
    """Folders of published checkpoints, newest first; whether they are whole is another question."""
    folder = run_dir / FOLDER
    found = [path for path in folder.iterdir() if STEP_FOLDER.fullmatch(path.name)] if folder.is_dir() else []
    return sorted(found, key=step_of, reverse=True)


def newest_checkpoint(run_dir: Path) -> int:
    """Step of the newest checkpoint that was written whole; 0 without one."""
    whole = [path.parent for path in run_dir.glob(f"{FOLDER}/step-*/{manifest.NAME}")]
    return max((step_of(path) for path in whole if STEP_FOLDER.fullmatch(path.name)), default=0)
