"""The loss of an output head on a GPU, side by side: ours, Liger, quack, CCE, torch's own, torch.compile, whole logits.

    python bench/gpu_loss.py                       on an H200 about four minutes; docs/gpu.md says how on a lent one
    python bench/gpu_loss.py --device cpu --tiny   shows that it works, and measures nothing

Heads of three models, T tokens of which a share has a label, bfloat16. Contestants take turns in one process with the
same rotating inputs, after each has been held against float64 here; one that is more than WRONG off is not timed.
`limit` is what cuBLAS takes in the same turns for the products that nobody can avoid, of the rows with a label: two
with a frozen head, three with a trained one, one without gradients. `control` is ours once more, and must read 1.00.
"Best of Liger and CCE" is the fastest of liger, liger_x8 and cce; memory is held against each of them. "Over all" is
our speed over the fastest other contestant, Liger's and quack's CuTe kernels included where they are installed.
"""

import gc
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from gpu_loss_contestants import Loss, contestants
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

HEADS = {"1B": (2048, 128256), "7B": (3584, 152064), "8B": (4096, 128256)}  # Llama-3.2, Qwen2.5, Llama-3.1: D, V
TINY = {"1B": (16, 500), "7B": (24, 700), "8B": (32, 500)}
HIDDEN_PREFIX = ("anchored", "chunked", "ours_torch")
RIVALS = ("liger", "liger_x8", "cce")
GOAL_SHARE = {"1B": 0.88, "7B": 0.94, "8B": 0.94}
GOAL_SPEED = {1.0: 1.3, 0.35: 2.5}
WRONG = 0.05  # relative norm: some bfloat16 products' roundings come to 1e-2; what is beyond computes something else
INPUTS = 2  # hidden states to rotate through; each call reads a head of a gigabyte besides
REFERENCE_ROWS = 1024


@dataclass(frozen=True)
class Case:
    head: str
    tokens: int
    kept: float
    trains: str  # "frozen": hidden states only; "trained": the head too; "forward": nothing

    @property
    def name(self) -> str:
        return f"{self.head} T={self.tokens} kept={self.kept:.0%} {self.trains}"


def cases() -> list[Case]:
    """The most important first."""
    found = [Case(head, 8192, kept, "frozen") for head in ("8B", "7B", "1B") for kept in (1.0, 0.35)]
    found += [Case(head, 8192, 1.0, "trained") for head in ("8B", "7B", "1B")]
    found += [Case(head, 8192, 1.0, "forward") for head in ("8B", "7B", "1B")]
    found += [Case(head, tokens, 1.0, "frozen") for tokens in (4096, 16384) for head in ("8B", "7B", "1B")]
    return found + [Case(head, 8192, 0.35, "trained") for head in ("8B", "7B", "1B")]


class Inputs:
    """Seeded tensors of a case. Labels are from hopeless to certain: the label's logit is raised by 0 to 25."""

    def __init__(self, case: Case, device: torch.device, tiny: bool) -> None:
        self.case, self.device = case, device
        self.hidden_size, self.vocabulary = (TINY if tiny else HEADS)[case.head]
        self.tokens = case.tokens // 128 if tiny else case.tokens
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        drawn = torch.Generator(device).manual_seed(1)
        spread = 3.0 * self.hidden_size**-0.5  # logits of deviation 3
        unembed = torch.randn(self.vocabulary, self.hidden_size, generator=drawn, device=device, dtype=dtype)
        self.unembed = unembed.mul_(spread).requires_grad_(case.trains == "trained")
        self.hiddens, self.labels, self.rows = [], [], []
        for _ in range(INPUTS):
            labels = torch.randint(0, self.vocabulary, (self.tokens,), generator=drawn, device=device)
            raised = 25 * torch.rand(self.tokens, 1, generator=drawn, device=device)
            hidden = torch.randn(self.tokens, self.hidden_size, generator=drawn, device=device)
            hidden += raised / 9.0 * self.unembed.detach()[labels]  # the row's squared length is 9
            order = torch.randperm(self.tokens, generator=drawn, device=device)
            rows = order[: max(1, round(case.kept * self.tokens))].sort().values
            masked = torch.full_like(labels, -100)
            masked[rows] = labels[rows]
            self.hiddens.append(hidden.to(dtype).requires_grad_(case.trains != "forward"))
            self.labels.append(masked)
            self.rows.append(rows)

    def leaves(self, turn: int) -> list[torch.Tensor]:
        found = {"forward": [], "frozen": [self.hiddens[turn]], "trained": [self.hiddens[turn], self.unembed]}
        return found[self.case.trains]


def run(loss: Loss, inputs: Inputs, turn: int) -> list[torch.Tensor]:
    """Loss and gradients of one turn."""
    at = turn % INPUTS
    given = inputs.hiddens[at], inputs.unembed, inputs.labels[at], inputs.rows[at]
    if inputs.case.trains == "forward":
        with torch.no_grad():
            return [loss(*given)]
    value = loss(*given)
    return [value.detach(), *torch.autograd.grad(value, inputs.leaves(at))]


@torch.no_grad()
def exact(inputs: Inputs) -> list[torch.Tensor]:
    """The same of turn 0 in float64, some rows at a time."""
    hidden, labels, rows = inputs.hiddens[0], inputs.labels[0], inputs.rows[0]
    wide = inputs.unembed.double()
    total = torch.zeros((), dtype=torch.float64, device=wide.device)
    grad_hidden = torch.zeros(hidden.shape, dtype=torch.float64, device=wide.device)
    grad_unembed = torch.zeros_like(wide) if inputs.case.trains == "trained" else None
    for part in rows.split(REFERENCE_ROWS):
        h, y = hidden[part].double(), labels[part][:, None]
        z = h @ wide.t()
        log_sum = z.logsumexp(-1, keepdim=True)
        total += (log_sum - z.gather(1, y)).sum()
        if inputs.case.trains == "forward":
            continue
        gradient = z.sub_(log_sum).exp_()
        gradient.scatter_add_(1, y, torch.full_like(log_sum, -1.0))
        grad_hidden[part] = gradient @ wide
        if grad_unembed is not None:
            grad_unembed.addmm_(gradient.t(), h)
    return [total, grad_hidden, grad_unembed][: {"forward": 1, "frozen": 2, "trained": 3}[inputs.case.trains]]


NAMES = ("loss", "grad_hidden", "grad_unembed")


def check(runners: dict[str, Loss], inputs: Inputs) -> tuple[dict[str, Any], dict[str, float]]:
    """Errors of each contestant against float64, or what it raised; and those of rounding the exact gradients."""
    right = exact(inputs)
    dtype = inputs.unembed.dtype
    rounding = {name: error(value.to(dtype), value) for name, value in zip(NAMES[1:], right[1:], strict=False)}
    errors: dict[str, Any] = {}
    for name, loss in runners.items():
        try:
            found = run(loss, inputs, 0)
            errors[name] = {what: error(mine, r) for what, mine, r in zip(NAMES, found, right, strict=False)}
        except Exception as problem:  # whatever a library or its compiler raises
            errors[name] = {"raised": first_line(problem)}
            gc.collect()
    return errors, rounding


def limit_call(inputs: Inputs) -> Any:
    """The unavoidable products of the kept rows, at once, by cuBLAS."""
    with torch.no_grad():
        kept = [hidden.detach()[rows] for hidden, rows in zip(inputs.hiddens, inputs.rows, strict=True)]
        weight = inputs.unembed.detach()
        logits = torch.empty(len(kept[0]), inputs.vocabulary, dtype=weight.dtype, device=weight.device)
        grad_hidden, grad_unembed = torch.empty_like(kept[0]), torch.empty_like(weight)

    @torch.no_grad()
    def call(turn: int) -> None:
        torch.mm(kept[turn % INPUTS], weight.t(), out=logits)
        if inputs.case.trains != "forward":
            torch.mm(logits, weight, out=grad_hidden)
        if inputs.case.trains == "trained":
            torch.mm(logits.t(), kept[turn % INPUTS], out=grad_unembed)

    return call


def measure(case: Case, runners: dict[str, Loss], device: torch.device, tiny: bool) -> dict[str, Any]:
    """Errors, times and memory of all contestants on a case."""
    inputs = Inputs(case, device, tiny)
    errors, rounding = check(runners, inputs)
    fit = {name: loss for name, loss in runners.items() if _is_right(errors[name])}
    calls: dict[str, Any] = {name: partial(run, loss, inputs) for name, loss in fit.items()}
    memory = {name: peak_extra_bytes(call, device) for name, call in calls.items()}
    own = [name for name in HIDDEN_PREFIX if name in fit]
    if own:
        calls["control"] = calls[own[0]]
    calls["limit"] = limit_call(inputs)
    times = take_turns(calls, device, rounds=3 if tiny else 7)
    found = {
        name: {**times.get(name, {}), "peak_extra_bytes": memory.get(name), "errors": errors[name]} for name in runners
    }
    ours = min(own, key=lambda name: times[name]["ms"]) if own else None
    return {
        **asdict(case),
        "shapes": {"D": inputs.hidden_size, "V": inputs.vocabulary, "T": inputs.tokens, "N": len(inputs.rows[0])},
        "dtype": str(inputs.unembed.dtype),
        "rounding": rounding,
        "limit": times["limit"],
        "control": times["control"]["ms"] / times[own[0]]["ms"] if own else None,
        "ours": ours,
        "contestants": found,
        **_ratios(ours, times, memory),
    }


def _is_right(errors: dict[str, Any]) -> bool:
    return "raised" not in errors and all(value <= WRONG for value in errors.values())


def _ratios(ours: str | None, times: dict[str, Any], memory: dict[str, int | None]) -> dict[str, Any]:
    """Of our faster back end: its share of the limit, its speed over the best rival, its memory over the least."""
    rivals = [name for name in RIVALS if name in memory]
    names = ("share_of_limit", "best_rival", "speed", "memory", "strongest", "over_all")
    found: dict[str, Any] = dict.fromkeys(names)
    if ours is None:
        return found
    found["share_of_limit"] = times["limit"]["ms"] / times[ours]["ms"]
    if others := [name for name in memory if name not in HIDDEN_PREFIX]:
        strongest = min(others, key=lambda name: times[name]["ms"])
        found |= {"strongest": strongest, "over_all": times[strongest]["ms"] / times[ours]["ms"]}
    if rivals:
        best = min(rivals, key=lambda name: times[name]["ms"])
        found |= {"best_rival": best, "speed": times[best]["ms"] / times[ours]["ms"]}
        least = min(memory[name] or 0 for name in rivals)
        found["memory"] = (memory[ours] or 0) / least if least else None
    return found


def goals(measured: dict[str, dict[str, Any]]) -> list[Goal]:
    """The issue's, for each head; those whose case was cut, or has no rival here, are not measured."""
    found = []
    for head in ("8B", "7B", "1B"):
        for kept, speed in GOAL_SPEED.items():
            at = Case(head, 8192, kept, "frozen").name
            result = measured.get(at, {})
            if kept == 1.0:
                found.append(Goal("share of the two-GEMM limit", at, GOAL_SHARE[head], result.get("share_of_limit")))
            found.append(Goal("speed over the best of Liger and CCE", at, speed, result.get("speed")))
            found.append(Goal("peak memory over the least of them", at, 1.0, result.get("memory"), at_least=False))
    return found


def rows_of(measured: dict[str, dict[str, Any]], names: list[str]) -> Iterator[list[object]]:
    """One line a case: milliseconds of each contestant, then ours against the limit and the rivals."""
    for case, result in measured.items():
        times = [_cell(result["contestants"][name]) for name in names]
        ratios = [result[name] for name in ("share_of_limit", "speed", "over_all", "memory", "control")]
        yield [case, result["limit"]["ms"], *times, *ratios]


def _cell(contestant: dict[str, Any]) -> object:
    if "raised" in contestant["errors"]:
        return "raised"
    return contestant.get("ms", "wrong")


def main() -> None:
    options = arguments(__doc__, seconds=240)
    device = options.device
    budget = Budget(options.seconds)
    runners, absent = contestants(device)
    measured: dict[str, dict[str, Any]] = {}
    for name, case in budget.each([(case.name, case) for case in cases()]):
        if options.tiny and case.tokens != 8192:
            continue
        measured[name] = measure(case, runners, device, options.tiny)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        print(f"{name}: done", flush=True)
    head = ("ms", "limit", *runners, "of limit", "speed", "over all", "memory", "control")
    controls = [result["control"] for result in measured.values() if result["control"] is not None]
    summary = table(head, list(rows_of(measured, list(runners))))
    summary += "".join(f"\nabsent: {name}: {reason}" for name, reason in absent.items())
    summary += f"\ncontrol: {min(controls):.3f} to {max(controls):.3f}" if controls else ""
    if device.type == "cuda" and any(abs(control - 1) > CONTROL_MARGIN for control in controls):
        summary += " - not 1.00: something disturbed the run, so trust none of it and run it again."
    found = {"what": "loss of an output head", "cases": measured, "absent": absent}
    finish("gpu_loss", options, found, goals(measured), budget, summary)


if __name__ == "__main__":
    main()
