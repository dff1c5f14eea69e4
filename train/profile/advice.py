"""What to change, with the gain that the figures promise. Only settings that there are."""

from collections.abc import Iterator
from dataclasses import dataclass

from tunesmith.train.config.config import AdapterKind, Attention, Config, Kernels, Offload, Packing, Precision
from tunesmith.train.profile.analysis import Profile, Row
from tunesmith.train.profile.categories import Category

LEAST_GAIN = 1.02  # less is not worth a line
ROOM = 0.6  # of a GPU's memory: with a peak below it there is room for larger choices


@dataclass(frozen=True)
class Advice:
    setting: str  # its key
    do: str  # as it is typed
    why: str  # with the figures
    gain: float  # the step gets so many times faster, at most


def advise(profile: Profile, config: Config, fill: float) -> list[Advice]:
    """The largest gain first. fill: of the positions that are computed, the fraction that holds a token."""
    rules = (
        _data,
        _packing,
        _precision,
        _recompute,
        _attention,
        _micro_batch,
        _communication,
        _offload,
        _kernels,
        _reporting,
    )
    found = [advice for rule in (*rules, _dropout) for advice in rule(profile, config, fill)]
    worth = [advice for advice in found if advice.gain >= LEAST_GAIN]
    return sorted(worth, key=lambda advice: advice.gain, reverse=True)


def _gain(saved: float, profile: Profile) -> float:
    """Of a step that takes so many seconds less."""
    step = profile.analysis.breakdown.step
    return step / (step - saved) if 0 <= saved < step else 1.0


def _category(profile: Profile, name: Category) -> Row:
    return next((row for row in profile.analysis.categories if row.name == name), Row(name, name))


def _has_room(profile: Profile) -> bool:
    memory, total = profile.analysis.memory, profile.ceilings.memory_bytes
    return memory is None or total is None or memory.peak_bytes < ROOM * total


def _data(profile: Profile, config: Config, fill: float) -> Iterator[Advice]:
    wait = profile.analysis.breakdown.parts["data wait"]
    share = profile.analysis.breakdown.share("data wait")
    yield Advice(
        "data.cache_dir",
        "data.cache_dir=<a folder on a local disk>",
        f"data wait is {share:.1%} of the step: prepared tokens are read from the cache as each step begins",
        _gain(wait, profile),
    )


def _packing(profile: Profile, config: Config, fill: float) -> Iterator[Advice]:
    breakdown = profile.analysis.breakdown
    computing = breakdown.parts["forward"] + breakdown.parts["backward"]
    if config.batch.packing is Packing.none and 0 < fill < 1:
        yield Advice(
            "batch.packing",
            "batch.packing=best_fit",
            f"{1 - fill:.0%} of the positions computed are padding",
            _gain(computing * (1 - fill), profile),
        )


def _precision(profile: Profile, config: Config, fill: float) -> Iterator[Advice]:
    ceilings, gemm = profile.ceilings, _category(profile, Category.gemm)
    if config.engine.precision is Precision.fp32 and ceilings.flops_bf16 and ceilings.flops_bf16 > ceilings.flops:
        faster = ceilings.flops_bf16 / ceilings.flops
        yield Advice(
            "engine.precision",
            "engine.precision=bf16",
            f"matrix products take {1000 * gemm.seconds:.3g} ms of the step, and bf16 is {faster:.1f}x as fast here",
            _gain(gemm.seconds * (1 - 1 / faster), profile),
        )


def _recompute(profile: Profile, config: Config, fill: float) -> Iterator[Advice]:
    again = profile.analysis.breakdown.parts["forward"] * (config.memory.recompute or 0.0)
    if _has_room(profile):
        yield Advice(
            "memory.recompute",
            "memory=keep",
            f"the backward repeats {config.memory.recompute or 0:.0%} of the forward ({1000 * again:.3g} ms)"
            f"{_peak_words(profile)}",
            _gain(again, profile),
        )


def _attention(profile: Profile, config: Config, fill: float) -> Iterator[Advice]:
    row = _category(profile, Category.attention)
    if config.model.attention is Attention.sdpa and config.batch.packing is Packing.best_fit:
        yield Advice(
            "model.attention",
            "model.attention=auto",
            f"attention takes {1000 * row.seconds:.3g} ms of the step with a mask over each packed sequence; at this "
            f"device's ceilings even that work takes {1000 * row.bound(profile.ceilings):.3g} ms",
            _gain(row.seconds - row.bound(profile.ceilings), profile),
        )


def _micro_batch(profile: Profile, config: Config, fill: float) -> Iterator[Advice]:
    """The host launches as much for a large micro batch as for a small one. Recording is the host's work too."""
    idle = sum(profile.analysis.breakdown.idle_in.get(phase, 0.0) for phase in ("forward", "backward"))
    idle = max(0.0, idle - (profile.recording or 0.0))
    accumulation = config.batch.gradient_accumulation_steps(len(profile.ranks))
    if accumulation > 1 and _has_room(profile):
        yield Advice(
            "batch.micro_batch_size",
            f"batch.micro_batch_size={config.batch.micro_batch_size * accumulation}",
            f"the device waits {1000 * idle:.3g} ms of the step for the host to start operations, in {accumulation} "
            f"forwards and backwards; one of each would do{_peak_words(profile)}",
            _gain(idle * (1 - 1 / accumulation), profile),
        )


def _communication(profile: Profile, config: Config, fill: float) -> Iterator[Advice]:
    exposed = min(rank.parts["communication"] for rank in profile.ranks)  # the rest is waiting for the slowest rank
    share, stage = exposed / profile.analysis.breakdown.step, config.engine.stage
    if len(profile.ranks) == 1:
        return
    if stage == 3 and _has_room(profile):
        yield Advice(
            "engine.stage",
            "engine=zero2",
            f"{share:.1%} of the step is communication that nothing hides, and ZeRO 3 sends half as much again as "
            f"ZeRO 2{_peak_words(profile)}",
            _gain(exposed / 3, profile),
        )
    accumulation = config.batch.gradient_accumulation_steps(len(profile.ranks))
    if accumulation > 1 and stage >= 2 and _has_room(profile):
        yield Advice(
            "engine.stage",
            "engine=zero1",
            f"{share:.1%} of the step is communication that nothing hides, and ZeRO {stage} sends gradients after each "
            f"of {accumulation} backwards, ZeRO 1 once{_peak_words(profile)}",
            _gain(exposed * (1 - 1 / accumulation), profile),
        )


def _offload(profile: Profile, config: Config, fill: float) -> Iterator[Advice]:
    idle = profile.analysis.breakdown.idle_in.get("update", 0.0)
    if config.engine.offload_optimizer is not Offload.none and _has_room(profile):
        yield Advice(
            "engine.offload_optimizer",
            "engine.offload_optimizer=none",
            f"the device waits {1000 * idle:.3g} ms of the step for an update on the host{_peak_words(profile)}",
            _gain(idle, profile),
        )


def _kernels(profile: Profile, config: Config, fill: float) -> Iterator[Advice]:
    lora = config.adapter.kind is AdapterKind.lora
    rows = [_category(profile, Category.loss), *([_category(profile, Category.lora)] if lora else [])]
    spent, least = sum(row.seconds for row in rows), sum(row.bound(profile.ceilings) for row in rows)
    if config.kernels is Kernels.off:
        yield Advice(
            "kernels",
            "kernels=auto",
            f"loss{' and LoRA' if lora else ''} take {1000 * spent:.3g} ms of the step without our kernels; at this "
            f"device's ceilings the same work takes {1000 * least:.3g} ms",
            _gain(spent - least, profile),
        )


def _reporting(profile: Profile, config: Config, fill: float) -> Iterator[Advice]:
    idle = profile.analysis.breakdown.idle_in.get("reporting", 0.0)
    if config.track.every_steps == 1:
        yield Advice(
            "track.every_steps",
            "track.every_steps=10",
            f"writing each step's figures takes {1000 * idle:.3g} ms of it",
            _gain(0.9 * idle, profile),
        )


def _dropout(profile: Profile, config: Config, fill: float) -> Iterator[Advice]:
    spent = sum(row.seconds for row in profile.analysis.top if "dropout" in row.name or row.name == "drop")
    if config.adapter.dropout:
        yield Advice(
            "adapter.dropout",
            "adapter.dropout=0",
            f"dropout takes {1000 * spent:.3g} ms of the step; without it another model is learned",
            _gain(spent, profile),
        )


def _peak_words(profile: Profile) -> str:
    memory, total = profile.analysis.memory, profile.ceilings.memory_bytes
    if memory is None:
        return ""
    of = f" of {total / 2**30:.0f} GiB" if total else ""
    return f"; the peak is {memory.peak_bytes / 2**30:.2g} GiB{of} now"
