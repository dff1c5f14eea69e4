"""The whole state of a run, saved and resumed.

<run>/checkpoints/step-000100/
    engine/            DeepSpeed's shards: weights, optimizer state, loss scale (adapter runs leave frozen weights out)
    rank-00000.safetensors and .json   random-number state of each rank
    rank-00000.files.json              what each rank has written, with digests
    state.json         counters of the loop
    MANIFEST.json      written last: what it is a checkpoint of, and size and SHA-256 of every file

A save is staged in step-000100.tmp-<random>. Each rank writes its files and makes sure of them; once all ranks say that
they have, rank 0 writes the manifest and renames the folder: before that rename there is no such checkpoint, and after
it, it is never written to again. latest.json beside the folders names the newest, for people: loading does not read it.
"""

import errno
import json
import os
import secrets
import threading
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from tunesmith.train.checkpoint import conversion
from tunesmith.train.checkpoint.find import FoundCheckpoint, make_way, set_aside_after
from tunesmith.train.checkpoint.publish import point_to, prune, publish
from tunesmith.train.checkpoint.random_state import load_random_state, random_state_files, seed_rank
from tunesmith.train.config.config import CheckpointConfig
from tunesmith.train.errors import TrainingError
from tunesmith.train.files import durable
from tunesmith.train.files.background_writer import RankFiles
from tunesmith.train.files.disk_errors import remedy
from tunesmith.train.files.fence import Superseded, fence
from tunesmith.train.files.manifest import Identity
from tunesmith.train.files.step_folders import FOLDER, published, step_folder, step_of
from tunesmith.train.ranks.distributed import World, broadcast_text, first_problem
from tunesmith.train.ranks.state import RunState
from tunesmith.train.ranks.step_vote import StepConsensus
from tunesmith.train.track.reporter import Reporter

if TYPE_CHECKING:
    from tunesmith.train.engine import Engine

SPARE = 1.2  # of the last checkpoint's size, free before the next is begun


@dataclass
class Save:
    """A checkpoint under way."""

    state: RunState  # as it was when the save began
    files: RankFiles
    target: Path
    started: float
    stall_seconds: float = 0.0  # that the step loop has lost to it
    publisher: threading.Thread | None = None  # rank 0's, once all ranks have written
    publishing: bool = False
    publish_problem: str = ""
    num_bytes: int = 0
    note: str = ""

    @property
    def unwritten(self) -> bool:
        return self.files.unwritten or (self.publisher is not None and self.publisher.is_alive())

    @property
    def problem(self) -> str:
        return self.files.problem or self.publish_problem


class Checkpoints:
    """The checkpoints of one run folder. Every rank calls each method at the same point of the run."""

    def __init__(
        self,
        run_dir: Path,
        settings: CheckpointConfig,
        identity: Identity,
        world: World,
        device: torch.device,
        reporter: Reporter,
    ) -> None:
        self.run_dir = run_dir
        self.saved_step: int | None = None  # of the newest checkpoint of this run, the same on every rank
        self._settings = settings
        self._identity = identity
        self._world = world
        self._device = device
        self._reporter = reporter
        self._save: Save | None = None
        self._failed_in_row = 0
        self._last_bytes = 0
        self._loaded: Path | None = None
        self._clock = time.monotonic()
        self.save_seconds = 0.0  # of the last save, from its beginning until it was published

    @property
    def folder(self) -> Path:
        return self.run_dir / FOLDER

    @property
    def clock_says_save(self) -> bool:
        """True on rank 0 when checkpoint.every_minutes have passed; the others go by its word (StepVote.save)."""
        minutes = self._settings.every_minutes
        return self._world.rank == 0 and minutes is not None and time.monotonic() - self._clock >= 60 * minutes

    @property
    def unwritten(self) -> bool:
        """True while this rank still writes a checkpoint in the background (StepVote.unwritten)."""
        return self._save is not None and self._save.unwritten

    @property
    def failed(self) -> bool:
        """True when this rank could not write its part (StepVote.failed)."""
        return self._save is not None and bool(self._save.problem)

    def save(self, engine: "Engine", state: RunState) -> Path | None:
        """Writes the state after state.step steps, in the background with checkpoint.async_save.

        Waits for a save that is under way. One that fails leaves a warning; TrainingError after too many in a row.
        Returns the checkpoint; None when there is none, or none yet.
        """
        self.settle()
        if self.saved_step == state.step:
            return step_folder(self.run_dir, state.step)
        self._clock = started = time.monotonic()
        durable.save_begins()
        target = step_folder(self.run_dir, state.step)
        staged, problem = self._begin(target)
        if problem:
            self._count_failure(state.step, problem)
            return None
        if staged is None:
            self.saved_step = state.step  # it is there already, and stays as it is
            return target
        files = RankFiles(staged, self._world.rank, background=self._settings.async_save)
        engine.save(staged, files)
        for name, data in random_state_files(self._world.rank).items():
            files.add_bytes(name, data)
        if self._world.rank == 0:
            files.add_bytes("state.json", durable.json_bytes(asdict(state)))
        files.finish()
        copied = RunState(**asdict(state))
        self._save = Save(copied, files, target, started, stall_seconds=time.monotonic() - started)
        if self._settings.async_save:
            return None
        self.settle()
        return target if self.saved_step == state.step else None

    def advance(self, consensus: StepConsensus, step: int) -> None:
        """Between two steps: publishes what all ranks have written meanwhile, or gives it up. Waits for nothing."""
        save = self._save
        if save is None or consensus.unwritten:
            return
        started = time.monotonic()
        if save.publishing or consensus.failed:
            self._end(save, first_problem(save.problem, self._device), step, started)
        else:
            save.publishing = True
            if self._world.rank == 0:
                save.publisher = threading.Thread(target=self._publish, args=(save,), name="publisher", daemon=True)
                save.publisher.start()
            save.stall_seconds += time.monotonic() - started

    def settle(self, step: int | None = None) -> None:
        """Until no save is under way: at the end, before the weights change hands, and when the run is stopped."""
        save = self._save
        if save is None:
            return
        started = time.monotonic()
        save.files.wait()
        problem = first_problem(save.files.problem, self._device)
        if not problem:
            if save.publisher is not None:
                save.publisher.join()
            elif self._world.rank == 0:
                self._publish(save)
            problem = first_problem(save.publish_problem, self._device)
        self._end(save, problem, save.state.step if step is None else step, started)

    def load(self, engine: "Engine", found: FoundCheckpoint, *, converted: Path | None, seed: int) -> RunState:
        """Restores engine, random numbers and counters from a checkpoint that choose() has found whole.

        converted: its engine files, made fit for these ranks and this stage, where they are not.
        """
        if converted:
            engine.load_converted(converted)
        else:
            engine.load(found.path)
        if not load_random_state(found.path, self._world.rank):
            seed_rank(seed, self._world.rank, found.manifest.step)
        tree = json.loads((found.path / "state.json").read_text(encoding="utf-8"))
        if "best_eval_loss" in tree:  # saved before evaluate.metric was a choice
            tree["best_metric"] = tree["best_eval_loss"]
        known = {entry.name for entry in fields(RunState)}
        if found.path.parent == self.folder:
            self.saved_step = found.manifest.step
        self._loaded, self._last_bytes = found.path, found.manifest.num_bytes
        return RunState(**{name: value for name, value in tree.items() if name in known})

    def forget_after(self, step: int) -> None:
        """Sets aside the checkpoints of later steps: the run goes back to this one, and must not find them again.

        Raises TrainingError, on all ranks, when that cannot be done.
        """
        self.settle()
        left = set_aside_after(self.run_dir, step) if self._world.rank == 0 else []
        if problem := first_problem(", ".join(left), self._device):
            raise TrainingError(f"checkpoints of later steps could not be set aside. {problem}.", at=str(self.folder))
        self.saved_step = min(step, self.saved_step) if self.saved_step is not None else None

    def steps(self) -> list[int]:
        """Steps with a published checkpoint, oldest first."""
        return sorted(map(step_of, published(self.run_dir)))

    def newest(self) -> Path | None:
        return step_folder(self.run_dir, self.saved_step) if self.saved_step is not None else None

    def _begin(self, target: Path) -> tuple[Path | None, str]:
        """The staged folder, None when the step is there already, whole; and what is wrong. The same on every rank."""
        problem = first_problem(self._lack_of_space(), self._device)
        if problem:
            return None, problem
        answer = {"folder": "", "problem": ""}
        if self._world.rank == 0:
            try:
                is_there, answer["problem"] = make_way(target)
                if not is_there and not answer["problem"]:
                    staged = target.with_name(f"{target.name}.tmp-{secrets.token_hex(4)}")
                    answer["folder"] = str(staged)
                    durable.make_folder(staged)
            except OSError as error:
                answer["problem"] = f"{error.strerror}: {error.filename or target}"
        answer = json.loads(broadcast_text(json.dumps(answer), self._device))
        return (Path(answer["folder"]) if answer["folder"] else None), answer["problem"]

    def _lack_of_space(self) -> str:
        folder = self.run_dir
        while not folder.exists():
            folder = folder.parent
        disk = os.statvfs(folder)
        free, needed = disk.f_bavail * disk.f_frsize, SPARE * self._last_bytes
        if free >= needed:
            return ""
        too_few = f"{free / 2**20:.0f} MiB are free, and a checkpoint needs {needed / 2**20:.0f} MiB"
        return f"{os.strerror(errno.ENOSPC)}: {too_few}"

    def _publish(self, save: Save) -> None:
        """Rank 0 alone, perhaps in a thread: nothing here may ask other ranks."""
        save.publish_problem = "rank 0 did not come to its manifest"  # what a thread raises is heard by nobody
        try:
            save.num_bytes = publish(save.files.folder, save.target, save.state.step, self._identity)
        except (OSError, ValueError, Superseded) as error:
            save.publish_problem = " ".join(str(error).split())
            return
        save.publish_problem = ""
        try:
            point_to(save.target, save.state.step)
            conversion.forget(self.run_dir)
            prune(self.run_dir, self._settings, keep={self._loaded}, best_step=save.state.best_step)
        except (OSError, Superseded) as error:
            save.note = f"step {save.state.step}: saved, but not tidied up after: {error}"

    def _end(self, save: Save, problem: str, step: int, started: float) -> None:
        self._save = None
        fence.check()
        if problem and self._world.rank == 0:
            durable.remove_tree(save.files.folder)
        save.stall_seconds += time.monotonic() - started
        if problem:
            self._count_failure(save.state.step, problem)
            return
        durable.save_ends()
        self.saved_step, self._failed_in_row, self._last_bytes = save.state.step, 0, save.num_bytes
        if save.note:
            self._reporter.warn(save.note)
        self.save_seconds = time.monotonic() - save.started
        self._reporter.saved(
            max(step, save.state.step), save_seconds=self.save_seconds, stall_seconds=save.stall_seconds
        )

    def _count_failure(self, step: int, problem: str) -> None:
        durable.save_ends()
        self._failed_in_row += 1
        limit = self._settings.max_failed_saves
        if self._failed_in_row >= limit:
            raise TrainingError(
                f"{limit} checkpoints in a row could not be written. {problem}",
                at=str(step_folder(self.run_dir, step)),
                do=f"{remedy(problem, 'mend that')}; the checkpoints before it are whole, and the same command goes on "
                "from them.",
            )
        self._reporter.warn(
            f"step {step}: the checkpoint could not be written ({problem}); training goes on "
            f"({self._failed_in_row} in a row, at {limit} the run ends)"
        )
