"""Block sizes, and the faster back end of the loss, picked by time on this GPU out of what the static tables offer.

    picks = pick([loss_workload(...), lora_workload(...)], device)     on one rank, which takes seconds to minutes
    use_picks(picks_as_json(picks), device)                            on every rank, so that all compute alike

A workload is a call of an operation at the sizes of a run. It is run with each candidate that its kernels ask for, one
kernel after another; a candidate must first give what the torch back end gives, and is only taken where it is faster by
MARGIN. What was found is kept in $XDG_CACHE_HOME/tunesmith/picks.json under GPU, driver, versions and the kernels'
source; where several processes write at once the last one stays, and the others pick again.
"""

import json
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from tunesmith.kernels import blocks
from tunesmith.kernels.blocks import Block, Key
from tunesmith.kernels.lce import backends
from tunesmith.kernels.pick_cache import cache_file, machine, read, write

MARGIN = 0.01  # of the time: below it the default stays, so that noise decides nothing
WARM_UP, ROUNDS = 2, 10
# Two results of 16-bit kernels, each up to three roundings of rms 2^-9 from the truth; float32 adds up thousands.
LIMITS = {torch.bfloat16: 1.2e-2, torch.float16: 2e-3, torch.float32: 1e-5}

TimedCall = Callable[[str], dict[str, torch.Tensor]]


@dataclass(frozen=True)
class Workload:
    """A call of an operation at the sizes of a run."""

    name: str  # with all sizes: picks are kept under it
    prepare: Callable[[], TimedCall]  # makes the tensors; the call takes a back end and returns results and gradients
    backends: tuple[str, ...]  # the Triton ones that compete
    dtype: torch.dtype
    head: tuple[int, int] | None = None  # (V, D) of the loss, whose back end is a pick of its own


@dataclass
class Pick:
    """What came out for one workload."""

    backend: str
    milliseconds: dict[str, float]  # the best of each back end, that of torch beside them
    blocks: list[tuple[Key, Block]] = field(default_factory=list)  # only those that are not the default
    head: tuple[int, int] | None = None
    rejected: list[str] = field(default_factory=list)  # candidates that failed, and how


Picks = dict[str, Pick]  # by the workload's name


def pick(workloads: Sequence[Workload], device: torch.device, cache: Path | None = None) -> Picks:
    """The pick of each workload, from the cache or by timing. Changes nothing: use_picks() does.

    cache: the file; None: the user's own. Raises RuntimeError when no candidate of an operation computes what torch
    does, and there is no other back end to fall back on.
    """
    cache = cache or cache_file()
    key = json.dumps(machine(device), sort_keys=True)
    known = read(cache, _from_json).get(key, {})
    found: Picks = {}
    for workload in workloads:
        if workload.name in known:
            found[workload.name] = _from_json(known[workload.name])
        elif workload.name not in found:
            found[workload.name] = _pick_one(workload, device)
    fresh = {name: _to_json(choice) for name, choice in found.items() if name not in known}
    if fresh:
        write(cache, key, fresh, _from_json)
    for name in fresh:
        for text in found[name].rejected:
            warnings.warn(f"a kernel is left out on this GPU: {name}: {text}", stacklevel=2)
    return found


def picks_as_json(picks: Picks, device: torch.device) -> str:
    """What another rank's use_picks() takes."""
    return json.dumps({"machine": machine(device), "picks": {name: _to_json(choice) for name, choice in picks.items()}})


def use_picks(text: str, device: torch.device) -> bool:
    """From now on kernels use these picks, and no earlier ones; on a machine that is not like theirs, none of them."""
    forget_picks()
    given = json.loads(text)
    if given["machine"] != machine(device):
        theirs, ours = ({**m, "kernels": m["kernels"][:8]} for m in (given["machine"], machine(device)))
        warnings.warn(f"block sizes stay as they are: they were timed on {theirs}, and this is {ours}.", stacklevel=2)
        return False
    for choice in map(_from_json, given["picks"].values()):
        blocks.picked.update(choice.blocks)
        if choice.head is not None:
            backends.picked[choice.head] = choice.backend
    return True


def forget_picks() -> None:
    """Back to the static tables."""
    blocks.picked.clear()
    backends.picked.clear()


def _pick_one(workload: Workload, device: torch.device) -> Pick:
    run = workload.prepare()
    exact = run("torch")
    choice = Pick("torch", {"torch": _milliseconds([lambda: run("torch")], device)[0]}, head=workload.head)
    trials = {name: _Trials(workload, run, name, exact, device, choice.rejected) for name in workload.backends}
    for name, trial in trials.items():
        trial.descend()
        if trial.best is not None:
            choice.milliseconds[name] = trial.milliseconds
    fit = {name: ms for name, ms in choice.milliseconds.items() if name != "torch"}
    if fit:
        choice.backend = min(fit, key=lambda name: fit[name])
        for trial in trials.values():
            choice.blocks += list((trial.best or {}).items())  # of each back end: a call may ask for one by its name
    elif workload.head is None:
        raise RuntimeError(f"no kernel computes what torch does on this GPU: {workload.name}: {choice.rejected}")
    return choice


class _Trials:
    """The candidates of one back end on one workload."""

    def __init__(
        self,
        workload: Workload,
        run: TimedCall,
        backend: str,
        exact: dict[str, torch.Tensor],
        device: torch.device,
        rejected: list[str],
    ) -> None:
        self._limit, self._run, self._backend = LIMITS[workload.dtype], run, backend
        self._exact, self._device, self._rejected = exact, device, rejected
        self._asked: dict[Key, list[Block]] = {}
        self.best: dict[Key, Block] | None = None  # None: nothing that works has been found yet
        self.milliseconds = float("inf")

    def descend(self) -> None:
        """Kernel by kernel, in the order in which they ask; the defaults first."""
        self._consider({})
        done: set[Key] = set()
        while waiting := [key for key in self._asked if key not in done]:
            done.add(waiting[0])
            for candidate in self._asked[waiting[0]][1:]:
                self._consider({**(self.best or {}), waiting[0]: candidate})

    def _consider(self, trial: dict[Key, Block]) -> None:
        fault = self._fault(trial)
        if fault:
            what = ", ".join(f"{kernel} {block.launch}" for (kernel, _), block in trial.items()) or "defaults"
            self._rejected.append(f"{self._backend}, {what}: {fault}")
            return
        if self.best is None:
            self.best, self.milliseconds = trial, _milliseconds([self._with(trial)], self._device)[0]
            return
        before, after = _milliseconds([self._with(self.best), self._with(trial)], self._device)
        if after < before * (1 - MARGIN):
            self.best, self.milliseconds = trial, after
        else:
            self.milliseconds = before

    def _with(self, trial: dict[Key, Block]) -> Callable[[], object]:
        def call() -> object:
            with blocks.trying(trial, self._asked):
                return self._run(self._backend)

        return call

    def _fault(self, trial: dict[Key, Block]) -> str | None:
        """Why a trial cannot be used, in words."""
        try:
            with blocks.trying(trial, self._asked):
                found = self._run(self._backend)
            for name, right in self._exact.items():
                error = (found[name].float() - right.float()).norm() / right.float().norm()
                if not float(error) <= self._limit:  # also where it is NaN
                    return f"{name} is {float(error):.1e} off what torch computes, more than {self._limit:.1e}"
        except Exception as error:  # whatever the compiler or the launch says of a candidate
            return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[:200]
        return None


def _milliseconds(calls: Sequence[Callable[[], object]], device: torch.device) -> list[float]:
    """Median time of each call, taking turns."""
    on_gpu = device.type == "cuda"  # else under the interpreter, where a call is slow and nobody needs the pick
    for _ in range(WARM_UP if on_gpu else 0):
        for call in calls:
            call()
    taken: list[list[Any]] = [[] for _ in calls]
    for _ in range(ROUNDS if on_gpu else 3):
        for call, times in zip(calls, taken, strict=True):
            if on_gpu:
                start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                start.record()
                call()
                end.record()
                times.append((start, end))
            else:
                started = time.process_time()  # of this process: what else the machine does must not decide a test
                call()
                times.append(1000 * (time.process_time() - started))
    if on_gpu:
        torch.cuda.synchronize(device)
        taken = [[start.elapsed_time(end) for start, end in times] for times in taken]
    return [statistics.median(times) for times in taken]


def _to_json(choice: Pick) -> dict[str, Any]:
    chosen = [
        {"kernel": kernel, "shape": list(shape), **asdict(block), "sizes": dict(block.sizes)}
        for (kernel, shape), block in choice.blocks
    ]
    return {**asdict(choice), "blocks": chosen}


def _from_json(given: dict[str, Any]) -> Pick:
    chosen = [
        (
            (entry["kernel"], tuple(entry["shape"])),
            blocks.block(entry["num_warps"], entry["num_stages"], **entry["sizes"]),
        )
        for entry in given["blocks"]
    ]
    head = None if given["head"] is None else (int(given["head"][0]), int(given["head"][1]))
    return Pick(given["backend"], dict(given["milliseconds"]), chosen, head, list(given["rejected"]))
