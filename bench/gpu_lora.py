"""LoRA layers on a GPU, side by side: ours, PEFT, PEFT through torch.compile, and Unsloth's scheme restated.

    python bench/gpu_lora.py                       about two minutes on an H200; docs/gpu.md says how on a lent one
    python bench/gpu_lora.py --device cpu --tiny   shows that it works, and measures nothing

Groups of layers that read one input (q/k/v, o, gate/up, down) of three models, N = 8192 rows, bfloat16, forward and
backward: gradients of x, A and B; base weights frozen. `bare` is the base products alone in the same turns, and the
`extra` of a contestant what it takes beyond them. Each is first held against float64 without dropout; with dropout ours
is held against our plain-torch back end, whose masks are the same. `control` is ours once more, and must read 1.00.
"""

import gc
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import gpu_lora_contestants as ways
import torch
from gpu_lora_contestants import Layers, Weights
from gpu_measuring import (
    CONTROL_MARGIN,
    Budget,
    Goal,
    arguments,
    error,
    finish,
    first_line,
    peak_extra_bytes,
    table,
    take_turns,
)

from tunesmith.kernels.device import why_not_triton

SIZES = {  # hidden size, width of k and v, feed-forward width: Llama-3.1-8B, Qwen2.5-7B, Llama-3.2-1B
    "8B": (4096, 1024, 14336),
    "7B": (3584, 512, 18944),
    "1B": (2048, 512, 8192),
}
GROUPS = {  # K in features, out features of each layer
    model: {"qkv": (D, (D, G, G)), "o": (D, (D,)), "gate_up": (D, (F, F)), "down": (F, (D,))}
    for model, (D, G, F) in SIZES.items()
}
ROWS = 8192
COMPILED_MODEL, COMPILED_RANK = "8B", 16  # torch.compile takes seconds for each group
GOAL_SCHEME, GOAL_PEFT = 0.5, 0.25
WRONG = 0.02
INPUTS = 2


@dataclass(frozen=True)
class Case:
    model: str
    group: str
    rank: int
    dropout: float

    @property
    def name(self) -> str:
        return f"{self.model} {self.group} r={self.rank} p={self.dropout:g}"


def cases() -> list[Case]:
    """The most important first."""
    return [
        Case(model, group, rank, dropout)
        for rank in (16, 64, 8)
        for dropout in (0.0, 0.05)
        for model in GROUPS
        for group in GROUPS[model]
    ]


class Inputs:
    """Seeded tensors of a case."""

    def __init__(self, case: Case, device: torch.device, tiny: bool) -> None:
        features, outs = GROUPS[case.model][case.group]
        rows, by = (64, 64) if tiny else (ROWS, 1)
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        drawn = torch.Generator(device).manual_seed(2)

        def tensor(*shape: int, scale: float = 1.0) -> torch.Tensor:
            return torch.randn(shape, generator=drawn, device=device, dtype=self.dtype) * scale

        features, outs = features // by, tuple(out // by for out in outs)
        self.xs = [tensor(rows, features).requires_grad_() for _ in range(INPUTS)]
        self.dys = [[tensor(rows, out) for out in outs] for _ in range(INPUTS)]
        base = [tensor(out, features, scale=features**-0.5) for out in outs]
        lora_a = [torch.nn.Parameter(tensor(case.rank, features, scale=features**-0.5)) for _ in outs]
        lora_b = [torch.nn.Parameter(tensor(out, case.rank, scale=case.rank**-0.5)) for out in outs]
        self.weights = Weights(base, lora_a, lora_b, 2.0, case.dropout)
        self.shapes = {"N": rows, "K": features, "O": outs}

    def leaves(self, turn: int) -> list[torch.Tensor]:
        return [self.xs[turn], *self.weights.lora_a, *self.weights.lora_b]


def run(layers: Layers, inputs: Inputs, turn: int) -> list[torch.Tensor]:
    """Outputs and the gradients of x, A and B."""
    at = turn % INPUTS
    outputs = layers(inputs.xs[at])
    gradients = torch.autograd.grad(outputs, inputs.leaves(at), inputs.dys[at])
    return [*(output.detach() for output in outputs), *gradients]


def run_bare(layers: Layers, inputs: Inputs, turn: int) -> None:
    at = turn % INPUTS
    torch.autograd.grad(layers(inputs.xs[at]), inputs.xs[at], inputs.dys[at])


@torch.no_grad()
def exact(inputs: Inputs) -> list[torch.Tensor]:
    """The same of turn 0 in float64, without dropout."""
    weights, x = inputs.weights, inputs.xs[0].double()
    outputs, das, dbs = [], [], []
    dx = torch.zeros_like(x)
    for weight, a, b, dy in zip(weights.base, weights.lora_a, weights.lora_b, inputs.dys[0], strict=True):
        w, a, b, dy = weight.double(), a.double(), b.double(), dy.double()
        u, du = x @ a.t(), weights.scaling * (dy @ b)
        outputs.append(x @ w.t() + weights.scaling * (u @ b.t()))
        dx += dy @ w + du @ a
        das.append(du.t() @ x)
        dbs.append(weights.scaling * (dy.t() @ u))
    return [*outputs, dx, *das, *dbs]


def contestants(case: Case, inputs: Inputs, device: torch.device) -> tuple[dict[str, Layers], dict[str, str]]:
    """Those that run here, and why the others do not."""
    on_gpu, weights = device.type == "cuda", inputs.weights
    found = {"base_first": ways.base_first(weights)}
    absent = {}
    if reason := why_not_triton(device):
        absent["ours"] = f"{reason}: ours_torch stands for it"
        found = {"ours_torch": ways.ours(weights, "torch"), **found}
    else:
        found = {"ours": ways.ours(weights, "triton"), **found}
    try:
        found["peft"] = ways.peft(weights)
        if not on_gpu:
            absent["peft_compiled"] = "it needs CUDA"
        elif (case.model, case.rank) == (COMPILED_MODEL, COMPILED_RANK):
            found["peft_compiled"] = torch.compile(found["peft"])
    except ImportError as reason:
        absent["peft"] = absent["peft_compiled"] = str(reason)
    return found, absent


def check(found: dict[str, Layers], inputs: Inputs) -> dict[str, dict[str, Any]]:
    """The largest relative error of each contestant; with dropout of ours alone."""
    right = exact(inputs) if not inputs.weights.dropout_p else None
    errors: dict[str, dict[str, Any]] = {}
    for name, layers in found.items():
        try:
            mine = run(layers, inputs, 0)
            if right is not None:
                errors[name] = {"largest": max(map(error, mine, right))}
            elif name.startswith("ours"):
                plain = run(ways.ours(inputs.weights, "torch"), inputs, 0)
                errors[name] = {"largest": max(error(m, p.double()) for m, p in zip(mine, plain, strict=True))}
            else:
                errors[name] = {"largest": None}  # its mask is its own; it was right without dropout
        except Exception as problem:  # whatever a library or its compiler raises
            errors[name] = {"raised": first_line(problem)}
    return errors


def measure(case: Case, device: torch.device, tiny: bool) -> tuple[dict[str, Any], dict[str, str]]:
    inputs = Inputs(case, device, tiny)
    found, absent = contestants(case, inputs, device)
    errors = check(found, inputs)
    fit = {name: layers for name, layers in found.items() if _is_right(errors[name])}
    calls: dict[str, Any] = {
        name: (lambda turn, layers=layers: run(layers, inputs, turn)) for name, layers in fit.items()
    }
    memory = {name: peak_extra_bytes(call, device) for name, call in calls.items()}
    ours = next((name for name in fit if name.startswith("ours")), None)
    if ours:
        calls["control"] = calls[ours]
    calls["bare"] = partial(run_bare, ways.bare(inputs.weights), inputs)
    times = take_turns(calls, device, rounds=3 if tiny else 15)
    extra = {name: times[name]["ms"] - times["bare"]["ms"] for name in fit}
    result = {
        **asdict(case),
        "shapes": inputs.shapes,
        "dtype": str(inputs.dtype),
        "bare": times["bare"],
        "control": times["control"]["ms"] / times[ours]["ms"] if ours else None,
        "contestants": {
            name: {
                **times.get(name, {}),
                "extra_ms": extra.get(name),
                "peak_extra_bytes": memory.get(name),
                "errors": errors[name],
            }
            for name in found
        },
    }
    return result, absent


def _is_right(errors: dict[str, Any]) -> bool:
    return "raised" not in errors and (errors["largest"] is None or errors["largest"] <= WRONG)


def layer_sums(measured: dict[str, dict[str, Any]]) -> dict[str, dict[str, float | None]]:
    """Extra milliseconds of the groups of one transformer layer together; None where one of them was not measured."""
    sums: dict[str, dict[str, float | None]] = {}
    for model, rank, dropout in {(case.model, case.rank, case.dropout): None for case in cases()}:
        groups = [measured.get(Case(model, group, rank, dropout).name) for group in GROUPS[model]]
        extras = {}
        for name in ("ours", "base_first", "peft", "peft_compiled"):
            parts = [group and group["contestants"].get(name, {}).get("extra_ms") for group in groups]
            extras[name] = None if None in parts else sum(parts)
        sums[f"{model} layer r={rank} p={dropout:g}"] = extras
    return sums


def goals(sums: dict[str, dict[str, float | None]]) -> list[Goal]:
    found = []
    for layer, extras in sums.items():
        for rival, wanted in (("base_first", GOAL_SCHEME), ("peft", GOAL_PEFT)):
            ours, theirs = extras["ours"], extras[rival]
            ratio = ours / theirs if ours is not None and theirs is not None and theirs > 0 else None
            found.append(Goal(f"extra time over that of {rival}", layer, wanted, ratio, at_least=False))
    return found


NAMES = ("ours", "ours_torch", "base_first", "peft", "peft_compiled")


def rows_of(measured: dict[str, dict[str, Any]]) -> Iterator[list[object]]:
    for case, result in measured.items():
        extras = [result["contestants"].get(name, {}).get("extra_ms") for name in NAMES]
        yield [case, result["bare"]["ms"], *extras, result["control"]]


def main() -> None:
    options = arguments(__doc__, seconds=150)
    device = options.device
    budget = Budget(options.seconds)
    measured: dict[str, dict[str, Any]] = {}
    absent: dict[str, str] = {}
    for name, case in budget.each([(case.name, case) for case in cases()]):
        if options.tiny and (case.model, case.rank) != (COMPILED_MODEL, COMPILED_RANK):
            continue
        measured[name], why_not = measure(case, device, options.tiny)
        absent |= why_not
        torch.compiler.reset()
        gc.collect()
    controls = [result["control"] for result in measured.values() if result["control"] is not None]
    head = ("extra ms", "bare", *NAMES, "control")
    summary = table(head, list(rows_of(measured)))
    summary += "".join(f"\nabsent: {name}: {reason}" for name, reason in absent.items())
    summary += f"\ncontrol: {min(controls):.3f} to {max(controls):.3f}" if controls else ""
    if device.type == "cuda" and any(abs(control - 1) > CONTROL_MARGIN for control in controls):
        summary += " - not 1.00: something disturbed the run, so trust none of it and run it again."
    sums = layer_sums(measured)
    found = {"what": "groups of LoRA layers, forward and backward", "cases": measured, "layers": sums, "absent": absent}
    finish("gpu_lora", options, found, goals(sums), budget, summary)


if __name__ == "__main__":
    main()
