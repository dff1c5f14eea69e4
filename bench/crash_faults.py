"""What crash_peer.py does to a run, and what became of it when the same command was started again."""

import os
import random
import shutil
import time
import zipfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from crash_jobs import Arm, Ended, Side, is_done_in
from crash_setting import (
    FOLDER_OF_STEP,
    NUM_STEPS,
    RUN,
    SAFE_STEP,
    SAVE_EVERY,
    SAVED_STEP,
    STEP_TEXT,
    WORLD_SIZE,
)

SEED = 20_261_121
FULL_DISK_BYTES = 64 * 1024  # no file of rank 1 may grow beyond; its shard of the optimizer has 0.9 MB
CANARY = "payload-ran"


@dataclass(frozen=True)
class Verdict:
    """What a restart did: went_on (from a step; bitwise the undisturbed run, or not), error or hung."""

    kind: str
    step: int | None = None
    same: bool | None = None
    message: str = ""

    @property
    def text(self) -> str:
        if self.kind != "went_on":
            return self.kind
        start = f"from step {self.step}" if self.step else "from scratch"
        return f"{start}, {'bitwise the same' if self.same else 'other losses'}"


class Faults:
    """One side at one ZeRO stage: its undisturbed run, and a run that stopped between two saves, to start from."""

    def __init__(self, side: Side, say: Callable[[str], None]) -> None:
        self.side, self._say = side, say
        self._folder = side.scratch / f"{side.name}-zero{side.stage}"
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir()
        self._num_runs = 0
        undisturbed = side.run(self._folder / "undisturbed", to_the_end=True)
        if undisturbed.codes != [0] * WORLD_SIZE or not is_done_in(undisturbed.trace):
            raise RuntimeError(f"{side.name} does not come to its end:\n{undisturbed.said[-3000:]}")
        self.reference = undisturbed.trace
        self.undisturbed = self._folder / "undisturbed" / RUN
        self.say(f"undisturbed run: {undisturbed.seconds:.1f} s")
        self._stopped = {step: self._stop_before_save(step + SAVE_EVERY) for step in (SAFE_STEP, SAVED_STEP)}

    def say(self, text: str) -> None:
        self._say(f"{self.side.name} ZeRO {self.side.stage}: {text}")

    def new_folder(self, *, holding: int | None = None) -> Path:
        """An empty one, or one with a run that was killed between two saves, the newest of them at that step."""
        self._num_runs += 1
        folder = self._folder / f"run-{self._num_runs}"
        folder.mkdir()
        if holding:
            shutil.copytree(self._stopped[holding], folder / RUN, symlinks=True)
        return folder

    def newest(self, folder: Path, step: int = SAVED_STEP) -> Path:
        return folder / FOLDER_OF_STEP[self.side.name].format(step)

    def checkpoints(self, folder: Path) -> list[Path]:
        """Those on the disk, by the names of their folders."""
        found = [self.newest(folder, step) for step in range(NUM_STEPS + 1)]
        return [path for path in found if path.is_dir()]

    def arm(self, step: int, kill_at: int) -> Arm:
        text = STEP_TEXT[self.side.name]
        return Arm(text.format(step), text.format(step + SAVE_EVERY), kill_at)

    def _stop_before_save(self, step: int) -> Path:
        """The run folder of a run whose ranks were killed at the first file operation of a save."""
        folder = self.new_folder()
        self.side.run(folder, arms={rank: self.arm(step, 1) for rank in range(WORLD_SIZE)})
        kept = [path.name for path in self.checkpoints(folder)]
        wanted = [self.newest(folder, step - back * SAVE_EVERY).name for back in (2, 1)]
        if kept != wanted:
            raise RuntimeError(f"{folder} holds {kept}, not {wanted}.")
        return folder / RUN

    def judge(self, ended: Ended) -> Verdict:
        if ended.hung:
            return Verdict("hung")
        if not is_done_in(ended.trace):
            return Verdict("error", message=last_error(ended.said))
        step = ended.trace[0][0]["step"]
        expected = [[row for row in rows if row["step"] >= step] for rows in self.reference]
        return Verdict("went_on", step, ended.trace == expected)

    def restart(self, folder: Path) -> Verdict:
        """The same command again, and once more where that ended with an error: perhaps it has put things right."""
        verdict = self.judge(self.side.run(folder))
        return self.judge(self.side.run(folder)) if verdict.kind == "error" else verdict

    def operations(self) -> list[list[str]]:
        """The file operations of the save at SAVED_STEP, of each rank, as "kind path"."""
        folder = self.new_folder()
        ended = self.side.run(folder, arms={rank: self.arm(SAVED_STEP, 0) for rank in range(WORLD_SIZE)})
        lines = [path.read_text(encoding="utf-8").splitlines() for path in ended.operations]
        rows = [[line.split(" ", 3) for line in mine] for mine in lines]
        self._check_bytes(folder, [row for mine in rows for row in mine])
        start = len(str(folder / RUN)) + 1
        return [[f"{kind} {path[start:]}" for _, kind, _, path in mine] for mine in rows]

    def _check_bytes(self, folder: Path, rows: list[list[str]]) -> None:
        """Raises when bytes of the checkpoint have come to the disk unseen."""
        copied = {path for _, kind, _, path in rows if kind == "copy"}
        written = sum(int(count) for _, _, count, _ in rows)
        files = [path for path in self.newest(folder).rglob("*") if path.is_file() and str(path) not in copied]
        there = sum(path.stat().st_size for path in files)
        if written < there:
            raise RuntimeError(f"{there:,} bytes of checkpoint, but only {written:,} were seen being written.")

    def sweep(self, every: int) -> dict[str, Any]:
        """A rank killed at each file operation of a save, or at every k-th from a drawn one; then the same command."""
        started, points, unreached = time.monotonic(), [], 0
        operations = self.operations()
        for rank, mine in enumerate(operations):
            first = random.Random(SEED + rank).randrange(every)
            for number in range(first + 1, len(mine) + 1, every):
                folder, what = self._killed(rank, number)
                if folder is None:
                    unreached += 1
                    continue
                verdict = self.restart(folder)
                points.append({"rank": rank, "operation": number, "what": what, **as_row(verdict)})
                self._by_hand(folder, points)
                shutil.rmtree(folder)
        self.say(f"{len(points)} kills: {dict(Counter(point['outcome'] for point in points))}, {unreached} not reached")
        counts = [len(mine) for mine in operations]
        seconds = time.monotonic() - started
        return {"operations": counts, "every": every, "unreached": unreached, "points": points, "seconds": seconds}

    def _killed(self, rank: int, number: int) -> tuple[Path | None, str]:
        """The folder of a run whose rank was killed at an operation of the save, and which it was.

        Who makes a folder that both ranks need depends on who comes first: one more operation for that rank. None where
        the save of four runs had none of that number.
        """
        for _ in range(4):
            folder = self.new_folder()
            killed = self.side.run(folder, arms={rank: self.arm(SAVED_STEP, number)})
            if killed.codes[rank] == -9:
                kind, path = killed.operations[rank].read_text(encoding="utf-8").splitlines()[-1].split(" ", 3)[1::2]
                return folder, f"{kind} {path.removeprefix(f'{folder / RUN}/')}"
            if killed.codes != [None] * WORLD_SIZE:
                raise RuntimeError(f"rank {rank} was not killed at operation {number}: {killed.codes}\n{killed.said}")
            shutil.rmtree(folder)
        return None, ""

    def _by_hand(self, folder: Path, points: list[dict[str, Any]]) -> None:
        """Where the command does not get any further: whether it does once a person removes the newest folder."""
        seen = sum("by_hand" in point for point in points)
        if points[-1]["outcome"] == "error" and seen < 3 and points[-1]["operation"] % 5 == 1:
            shutil.rmtree(self.checkpoints(folder)[-1])
            points[-1]["by_hand"] = self.judge(self.side.run(folder)).text

    def flips(self, count: int) -> dict[str, Any]:
        """One random bit of the newest checkpoint changed, so many times; every byte of it is as likely."""
        started, draw, found = time.monotonic(), random.Random(SEED), []
        for _ in range(count):
            folder = self.new_folder(holding=SAVED_STEP)
            newest = self.newest(folder)
            files = sorted(path for path in newest.rglob("*") if path.is_file())
            [file] = draw.choices(files, weights=[path.stat().st_size for path in files])
            byte, bit = draw.randrange(file.stat().st_size), draw.randrange(8)
            data = bytearray(file.read_bytes())
            data[byte] ^= 1 << bit
            file.write_bytes(data)
            verdict = self.restart(folder)
            found.append({"file": str(file.relative_to(newest)), "byte": byte, "bit": bit, **as_row(verdict)})
            shutil.rmtree(folder)
        self.say(f"{count} flips: {dict(Counter(one['outcome'] for one in found))}")
        return {"count": count, "found": found, "seconds": time.monotonic() - started}

    def mid_epoch(self) -> dict[str, Any]:
        """Killed in the first epoch, resumed, killed again in it, resumed: every loss, sample and weight compared."""
        folder, rows = self.new_folder(), [[] for _ in range(WORLD_SIZE)]
        started_at = []
        for step in (2 * SAVE_EVERY, 3 * SAVE_EVERY, None):
            arms = {} if step is None else {rank: self.arm(step, 1) for rank in range(WORLD_SIZE)}
            ended = self.side.run(folder, arms=arms)
            started_at.append(ended.trace[0][0]["step"])
            for rank, mine in enumerate(ended.trace):
                rows[rank] = [row for row in rows[rank] if row["step"] < started_at[-1]] + mine
        keys = {"losses": "loss", "samples": "ids", "weights": "weights"}
        found = {name: self._same(rows, key) for name, key in keys.items()}
        self.say(f"resumed at steps {started_at[1:]}: same {found}")
        return {"resumed_at": started_at[1:], **found}

    def _same(self, rows: list[list[dict[str, Any]]], key: str) -> bool:
        return [[row[key] for row in mine] for mine in rows] == [[row[key] for row in mine] for mine in self.reference]

    def full_disk(self) -> dict[str, Any]:
        """Rank 1 can write no large file from the save at SAVED_STEP on; then the disk is free again."""
        folder = self.new_folder(holding=SAFE_STEP)
        ended = self.side.run(folder, file_bytes={1: FULL_DISK_BYTES})
        went_on = is_done_in(ended.trace)
        verdict = self.restart(folder)
        self.say(f"full disk: training {'went on' if went_on else 'ended'}; afterwards {verdict.text}")
        return {"went_on": went_on, "said": last_error(ended.said), **as_row(verdict)}

    def latest_missing(self) -> dict[str, Any]:
        """The file that names the newest state is gone: DeepSpeed's in the checkpoint, or ours beside it."""
        folder = self.new_folder(holding=SAVED_STEP)
        gone = [path for path in (folder / RUN).rglob("latest*") if path.is_file() and self._is_of_newest(path, folder)]
        for path in gone:
            path.unlink()
        verdict = self.restart(folder)
        self.say(f"latest missing: {verdict.text}")
        return {"removed": [str(path.relative_to(folder)) for path in gone], **as_row(verdict)}

    def _is_of_newest(self, path: Path, folder: Path) -> bool:
        return self.newest(folder) in path.parents or not any(old in path.parents for old in self.checkpoints(folder))

    def all_bad(self) -> dict[str, Any]:
        """Every file of every checkpoint is cut to half."""
        folder = self.new_folder(holding=SAVED_STEP)
        for checkpoint in self.checkpoints(folder):
            for path in checkpoint.rglob("*"):
                if path.is_file():
                    os.truncate(path, path.stat().st_size // 2)
        verdict = self.restart(folder)
        self.say(f"all bad: {verdict.text}")
        return as_row(verdict)

    def hostile_pickles(self) -> list[dict[str, Any]]:
        """A call is put before the pickle of each file of the newest checkpoint that holds one, one file at a time."""
        names = [path.relative_to(self.newest(self._stopped[SAVED_STEP].parent)) for path in self._pickles()]
        found = []
        for name in names:
            folder = self.new_folder(holding=SAVED_STEP)
            plant(self.newest(folder) / name, f"touch {folder / CANARY}")
            if self.side.name == "tunesmith":
                sign(self.newest(folder), str(name))
            verdict = self.restart(folder)
            found.append({"file": str(name), "ran": (folder / CANARY).exists(), **as_row(verdict)})
            shutil.rmtree(folder)
        self.say(f"hostile pickles: ran {sum(one['ran'] for one in found)} of {len(found)}")
        return found

    def _pickles(self) -> list[Path]:
        newest = self.newest(self._stopped[SAVED_STEP].parent)
        return [path for path in sorted(newest.rglob("*")) if path.is_file() and zipfile.is_zipfile(path)]


def as_row(verdict: Verdict) -> dict[str, Any]:
    return {"outcome": verdict.text} | ({"message": verdict.message} if verdict.message else {})


def last_error(said: str) -> str:
    """The line that says most of what went wrong."""
    lines = [line.strip() for line in said.splitlines() if "Error" in line]
    lines = [line for line in lines if "gloo" not in line] or lines  # that the other rank is gone is not the cause
    return lines[-1][:300] if lines else said.strip()[-300:]


def plant(file: Path, command: str) -> None:
    """Puts a call of os.system before what torch.save wrote; everything else stays and still loads."""
    text = command.encode()
    # Pickle's opcodes: os.system, a text, a tuple of it, call; all of them are also in torch's weights_only subset.
    call = b"cos\nsystem\nX" + len(text).to_bytes(4, "little") + text + b"\x85R"
    with zipfile.ZipFile(file) as old:
        members = [(info.filename, old.read(info)) for info in old.infolist()]
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as new:
        for name, data in members:
            new.writestr(name, call + data if name.endswith("/data.pkl") else data)


def sign(checkpoint: Path, name: str) -> None:
    """Makes our manifest fit the changed file, as somebody would who may write there: what is left is the reading."""
    from tunesmith.train.files.durable import digest_of
    from tunesmith.train.files.manifest import NAME, read_manifest

    manifest = read_manifest(checkpoint)
    signed = replace(manifest, files={**manifest.files, name: digest_of(checkpoint / name)})
    (checkpoint / NAME).write_bytes(signed.to_bytes())
