"""Whole optimizer steps on one GPU: tokens a second and peak memory, ours beside transformers, PEFT, TRL and Liger.

    python bench/gpu_steps.py --seconds 400         under nine minutes on an H200; docs/gpu.md says how on a lent one
    python bench/gpu_steps.py --device cpu --tiny   the dry run: shows that it works, and measures nothing

Random weights of the shapes of Llama-3.1-8B, Llama-3.2-1B and Qwen2.5-7B, sequences of 4,096 tokens, bf16, AdamW: LoRA
of rank 16 with dropout 0.1, and full fine-tuning. Every contestant is a process of its own, as each patches
transformers in its own way; they take turns: one has the GPU, makes its model, warms up, is timed, and lets go of all
memory. Turns go through all contestants forwards and then backwards; ours comes a second time as the control. The first
losses of all have to agree, else a contestant's time does not count. Who is not installed, runs out of memory or fails
is named.
"""

import gc
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
from gpu_measuring import CONTROL_MARGIN, Budget, Goal, arguments, finish, first_line, table
from gpu_steps_contestants import BUILD, Case

CONTESTANTS = ("ours", "control", *(name for name in BUILD if name != "ours"))
WARM_UP_STEPS, STEPS = 4, 8
# Of the losses of the first steps. bf16, and masks of dropout that nobody shares; tiny ones are fp32 without dropout.
SAME_LOSS, SAME_TINY_LOSS = 0.02, 1e-4
GOAL_LORA, GOAL_TOKENS, GOAL_MEMORY, GOAL_FULL = 1.3, 16_200, 0.7, 1.15
CASES = (Case("8B", "lora"), Case("1B", "none"), Case("1B", "lora"), Case("7B", "lora"))
TINY_CASES = tuple(Case(case.model, case.adapter, 2, 64, tiny=True) for case in CASES[:2])


def turn(name: str, case: Case, device: torch.device) -> dict[str, Any]:
    """One contestant's model made, warmed up, timed and gone again; or why that could not be."""
    on_gpu = device.type == "cuda"
    try:
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(device)
        step = BUILD["ours" if name == "control" else name](case, device)
        losses = [float(step(number)) for number in range(WARM_UP_STEPS)]
        started = _now(device)
        for number in range(STEPS):
            step(number)
        seconds = (_now(device) - started) / STEPS
        peak = torch.cuda.max_memory_allocated(device) if on_gpu else None
        return {"losses": losses, "seconds": seconds, "peak_bytes": peak}
    except Exception as problem:  # whatever a library, its compiler or the GPU's memory says
        return {"failed": first_line(problem)}
    finally:
        step = None
        gc.collect()
        if on_gpu:
            torch.cuda.empty_cache()


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def serve(name: str, device: torch.device) -> None:
    """A contestant's process: a case a line in, what its turn found a line out."""
    answers, sys.stdout = sys.stdout, sys.stderr  # libraries print what they like
    for line in sys.stdin:
        answers.write(json.dumps(turn(name, Case.of(line), device)) + "\n")
        answers.flush()


class Contestant:
    """A process that waits for its turns."""

    def __init__(self, name: str, device: torch.device) -> None:
        self.name = name
        command = [sys.executable, __file__, "--serve", name, device.type]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def turn(self, case: Case) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(case.text() + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        return json.loads(answer) if answer else {"failed": "its process is gone"}

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def measure(case: Case, contestants: Sequence[Any]) -> dict[str, Any]:
    """Turns forwards and backwards, and what they come to. contestants have a name and turn(case)."""
    turns: dict[str, list[dict[str, Any]]] = {one.name: [one.turn(case)] for one in contestants}
    for one in reversed(contestants):
        if "failed" not in turns[one.name][0]:
            turns[one.name].append(one.turn(case))
    found = {name: _joined(case, taken) for name, taken in turns.items()}
    ours = found["ours"]
    for one in found.values():
        if "failed" not in one and "failed" not in ours:
            one["loss_differs"] = max(
                abs(theirs / mine - 1) for mine, theirs in zip(ours["losses"], one["losses"], strict=True)
            )
            one["counts"] = one["loss_differs"] <= (SAME_TINY_LOSS if case.tiny else SAME_LOSS)
    control = found["control"]
    if control.get("counts"):
        control["control"] = ours["seconds"] / control["seconds"]
    return {"shape": case.shape, "tokens": case.tokens, "contestants": found}


def _joined(case: Case, turns: Sequence[dict[str, Any]]) -> dict[str, Any]:
    failed = next((one for one in turns if "failed" in one), None)
    if failed:
        return failed
    best = min(turns, key=lambda one: one["seconds"])
    return {**best, "turns": [one["seconds"] for one in turns], "tokens_per_second": case.tokens / best["seconds"]}


def planned_goals() -> list[dict[str, Any]]:
    """The goals as they stand before anything is measured."""
    return [vars(goal) for goal in goals({})]


def goals(measured: dict[str, dict[str, Any]]) -> list[Goal]:
    lora, full = CASES[0].name, CASES[1].name
    speed, tokens, memory = _against_best(measured.get(lora))
    full_speed, _, _ = _against_best(measured.get(full))
    return [
        Goal("tokens/s over the best peer", lora, GOAL_LORA, speed),
        Goal("tokens/s", lora, GOAL_TOKENS, tokens),
        Goal("peak memory over the best peer's", lora, GOAL_MEMORY, memory, at_least=False),
        Goal("tokens/s over the best peer", full, GOAL_FULL, full_speed),
    ]


def _against_best(result: dict[str, Any] | None) -> tuple[float | None, float | None, float | None]:
    """Our speed over the fastest peer's, our tokens a second, our peak over the leanest peer's."""
    if result is None or "failed" in result["contestants"]["ours"]:
        return None, None, None
    ours = result["contestants"]["ours"]
    peers = [
        one for name, one in result["contestants"].items() if name not in ("ours", "control") and one.get("counts")
    ]
    if not peers:
        return None, ours["tokens_per_second"], None
    fastest = max(one["tokens_per_second"] for one in peers)
    peaks = [one["peak_bytes"] for one in peers if one["peak_bytes"]]
    memory = ours["peak_bytes"] / min(peaks) if peaks else None
    return ours["tokens_per_second"] / fastest, ours["tokens_per_second"], memory


def rows_of(measured: dict[str, dict[str, Any]]) -> list[list[object]]:
    return [
        [case, name, one.get("tokens_per_second"), (one.get("peak_bytes") or 0) / 2**30 or None,
         one.get("loss_differs"), one.get("failed", "" if one.get("counts") else "its losses differ")]
        for case, result in measured.items()
        for name, one in result["contestants"].items()
    ]  # fmt: skip


def main() -> None:
    if "--serve" in sys.argv:
        serve(sys.argv[2], torch.device(sys.argv[3]))
        return
    options = arguments(__doc__, seconds=400)
    budget = Budget(options.seconds)
    contestants = [Contestant(name, options.device) for name in CONTESTANTS]
    cases = TINY_CASES if options.tiny else CASES
    measured = {}
    for name, case in budget.each([(case.name, case) for case in cases]):
        measured[name] = measure(case, contestants)
    for one in contestants:
        one.close()
    absent = {
        f"{case}: {name}": one["failed"]
        for case, result in measured.items()
        for name, one in result["contestants"].items()
        if "failed" in one
    }
    controls = [
        one["control"] for result in measured.values() if "control" in (one := result["contestants"]["control"])
    ]
    summary = table(("case", "contestant", "tokens/s", "peak GiB", "loss differs", ""), rows_of(measured))
    summary += f"\ncontrol: {min(controls):.3f} to {max(controls):.3f}" if controls else ""
    if options.device.type == "cuda" and any(abs(control - 1) > CONTROL_MARGIN for control in controls):
        summary += " - not 1.00: something disturbed the run, so trust none of it and run it again."
    found = {"what": "whole optimizer steps", "cases": measured, "absent": absent}
    finish("gpu_steps", options, found, goals(measured), budget, summary)


if __name__ == "__main__":
    main()
