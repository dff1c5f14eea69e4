"""What a trace is said to show, on traces written by hand."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hand_made_trace import CPU, GPU, launch, memory, on_gpu, op, step
from torch.profiler import profile
from torch.utils.flop_counter import FlopCounterMode

from tunesmith.train.config.compose import compose_config
from tunesmith.train.config.tree import schema_keys
from tunesmith.train.profile.advice import Advice, advise
from tunesmith.train.profile.analysis import Profile, Row, analyse
from tunesmith.train.profile.breakdown import PARTS, break_down, rank_times, row_of, waiting_words
from tunesmith.train.profile.ceilings import Ceilings
from tunesmith.train.profile.costs import Known, cost
from tunesmith.train.profile.intervals import both, length, union, without
from tunesmith.train.profile.memory import KINDS, timeline
from tunesmith.train.profile.page import render
from tunesmith.train.profile.trace import read_trace

CEILINGS = Ceilings("a device", "fp32", flops=1e9, bytes_per_second=1e9)


def microseconds(parts: dict[str, float]) -> dict[str, float]:
    return {name: round(1e6 * seconds, 6) for name, seconds in parts.items() if seconds}


def test_intervals_are_those_of_sets_of_points() -> None:
    left, right = [(0, 4), (3, 6), (9, 12), (12, 13)], [(1, 2), (5, 10), (11, 11)]

    def points(intervals: list[Any]) -> set[int]:
        return {point for start, end in intervals for point in range(start, end)}

    a, b = union(left), union(right)
    assert a == [(0, 6), (9, 13)]
    assert points(both(a, b)) == points(left) & points(right)
    assert points(without(a, b)) == points(left) - points(right)
    assert length(a) == len(points(left))


def test_every_moment_of_a_step_on_a_cpu_is_in_one_part() -> None:
    broken = break_down(read_trace(CPU, on_gpu=False))
    assert microseconds(broken.parts) == {
        "data wait": 10,
        "forward": 20,  # the product alone: what the host does around it is idle
        "backward": 28,
        "communication": 17,
        "optimizer": 5,
        "idle": 20,
    }
    assert broken.step == pytest.approx(sum(broken.parts.values()))
    assert microseconds({"all": broken.communication, "hidden": broken.overlapped}) == {"all": 20, "hidden": 3}
    assert microseconds(broken.idle_in) == {"forward": 10, "update": 10}


def test_work_of_a_gpu_belongs_to_the_phase_that_asked_for_it() -> None:
    broken = break_down(read_trace(GPU, on_gpu=True))
    assert microseconds(broken.parts) == {
        "data wait": 10,
        "forward": 26,
        "backward": 10,
        "communication": 15,
        "copies": 4,
        "optimizer": 8,
        "idle": 27,
    }
    assert microseconds({"all": broken.communication, "hidden": broken.overlapped}) == {"all": 20, "hidden": 5}
    assert break_down(read_trace(GPU, on_gpu=True, whole=False)) == broken


def test_steps_are_averaged_and_what_lies_between_them_is_left_out() -> None:
    later = [event | {"ts": event["ts"] + 1000} for event in CPU[:-1]]
    one, two = (break_down(read_trace(events, on_gpu=False)) for events in (CPU, [*CPU, *later]))
    assert two.parts == pytest.approx(one.parts)
    assert two.step == pytest.approx(one.step)


def rows_of(events: list[dict[str, Any]], *, on_gpu: bool) -> dict[str, Row]:
    trace = read_trace(events, on_gpu=on_gpu)
    return {row.name: row for row in analyse(trace, break_down(trace), {}).categories}


def test_kinds_of_work_have_their_time_flops_and_bytes() -> None:
    cpu, gpu = rows_of(CPU, on_gpu=False), rows_of(GPU, on_gpu=True)
    assert microseconds({name: row.seconds for name, row in cpu.items()}) == {
        "LoRA": 20,  # by what called it
        "norm, elementwise": 28,
        "optimizer": 5,
        "communication": 25,  # of both threads
    }
    assert cpu["LoRA"].flops == 2 * 4 * 8 * 2
    assert cpu["LoRA"].num_bytes == 4 * (4 * 8 + 8 * 2 + 4 * 2)
    assert microseconds({name: row.seconds for name, row in gpu.items()}) == {
        "GEMM": 18,
        "loss": 8,
        "norm, elementwise": 10,
        "communication": 20,
        "copies": 4,
        "optimizer": 8,
    }
    assert gpu["GEMM"].flops == 2 * 4 * 8 * 2
    assert gpu["norm, elementwise"].num_bytes == 3 * 4 * 10


def test_the_product_with_the_adapted_weight_is_no_lora() -> None:
    events = [*step(), op("LoraLinear", 10, 30), op("aten::addmm_", 11, 19), op("aten::mm", 20, 24)]
    assert microseconds({name: row.seconds for name, row in rows_of(events, on_gpu=False).items()}) == {
        "GEMM": 8,
        "LoRA": 4,
    }


def test_waits_are_named_with_their_line_of_code() -> None:
    for events, is_gpu, name, where, micro in (
        (CPU, False, "aten::_local_scalar_dense", "autograd::engine::evaluate_function: MulBackward0", 1),
        (GPU, True, "cudaStreamSynchronize", "tunesmith/train/engine.py(118): step", 5),
    ):
        trace = read_trace(events, on_gpu=is_gpu)
        (stall,) = analyse(trace, break_down(trace), {}).stalls
        assert (stall.what, stall.phase, stall.where, stall.count) == (name, "backward", where, 1)
        assert 1e6 * stall.seconds == pytest.approx(micro)


def test_memory_is_told_apart_by_when_it_comes_and_goes() -> None:
    gpu = 1  # torch's number for CUDA; the host is 0
    events = [
        *step(),
        memory(2, 10, 1, 110, gpu),  # a batch
        memory(12, 100, 2, 210, gpu),  # an activation
        memory(13, 7, 3, 217, gpu),
        memory(14, -7, 3, 210, gpu),  # a temporary
        memory(50, 40, 4, 250, gpu),  # a gradient
        memory(60, -100, 2, 150, gpu),
        memory(80, 20, 5, 170, gpu),  # state
        memory(90, -40, 4, 130, gpu),
        memory(91, 1000, 6, 9999),  # of the host
        memory(150, 500, 7, 9999, gpu),  # after the step
    ]
    found = timeline(read_trace(events, on_gpu=True), {"parameters": 60, "optimizer state": 30})
    assert found is not None
    rows = [dict(zip(found.held, row, strict=True)) for row in zip(*found.held.values(), strict=True)]
    assert found.peak == dict.fromkeys(KINDS, 0) | {
        "parameters": 60,
        "optimizer state": 30,
        "gradients, buckets": 40,
        "activations": 100,
        "batches": 10,
        "other": 10,  # allocated before, by nobody known
    }
    assert [sum(row.values()) for row in rows] == [100, 110, 210, 217, 210, 250, 150, 170, 130]
    assert rows[3]["temporary"] == 7
    assert found.largest == [(1, 100, "forward"), (1, 40, "backward"), (1, 10, "reading data")]
    assert rows[-1]["optimizer state"] == 50
    assert timeline(read_trace(step(), on_gpu=True), {}) is None


@pytest.mark.parametrize("causal", [True, False])
def test_flops_are_those_that_torch_counts(causal: bool) -> None:
    a, b, c = torch.ones(3, 5), torch.ones(5, 7), torch.ones(3, 7)
    batch, other = torch.ones(2, 3, 5), torch.ones(2, 5, 4)
    query = torch.ones(2, 3, 6, 8, requires_grad=True)

    def attend() -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(query, query, query, is_causal=causal)

    def work() -> None:
        torch.mm(a, b), torch.addmm(c, a, b), c.addmm_(a, b), torch.bmm(batch, other)

    with FlopCounterMode(display=False) as counted:
        work()
    with profile(record_shapes=True) as recorded:
        work()
        attend().sum().backward()
    found = dict[str, float]()
    for event in recorded.events():
        values = [str(value) if value is not None else "" for value in event.concrete_inputs or []]
        types = ["float"] * len(event.input_shapes)
        made = op(event.name, 0, 1, dims=event.input_shapes)
        each = read_trace([*step(), made | {"ts": 50}], on_gpu=False).ops[0]
        typed = replace(each, values=values, types=types)
        found[event.name] = found.get(event.name, 0.0) + cost(typed, event.name, Known())[0]
    products = sum(flops for name, flops in found.items() if "mm" in name)
    assert products == counted.get_total_flops() + 2 * 3 * 5 * 7  # torch's counter does not know addmm_
    forward = 2 * 2 * (2 * 3) * 6 * 6 * 8 / (2 if causal else 1)
    kernel = "aten::_scaled_dot_product_flash_attention_for_cpu"
    assert found[kernel] == forward
    assert found[f"{kernel}_backward"] == 2.5 * forward


def test_what_our_own_kernels_do_follows_from_what_launched_them() -> None:
    lora = [[2, 3, 8], [6, 8], [5, 8], [4, 8], [4, 8], [6, 4], [5, 4], [], []]  # x, two weights, As, Bs and biases
    shaped = [
        op("LoraLinear", 10, 12, dims=lora, sequence=7),
        op("_LinearCrossEntropy", 12, 14, dims=[[9, 8], [11, 8], [], [5], [9]]),
        op("aten::_flash_attention_forward", 14, 16, dims=[[9, 4, 2], [9, 1, 2], [9, 1, 2]]),
        op("LoraLinearBackward", 40, 42, dims=[[2, 3, 6], [2, 3, 5]], sequence=7),
        op("aten::_flash_attention_backward", 42, 44, dims=[[9, 4, 2], [9, 4, 2], [9, 1, 2], [9, 1, 2]]),
    ]
    names = ("down", "up", "lce_terms_kernel", "lce_gemm_kernel", "flash_fwd", "grad_up", "flash_bwd")
    at = (10, 11, 12, 13, 14, 40, 42)
    launched = [launch(number, start, start + 0.5) for number, start in enumerate(at)]
    ran = [on_gpu("kernel", name, 50 + i, 51 + i, i) for i, name in enumerate(names)]
    trace = read_trace([*step(), *shaped, *launched, *ran], on_gpu=True)
    known = Known(pairs=20, trains_head=True)
    found = {row.name: row.flops for row in analyse(trace, break_down(trace), {}, known).categories}
    of_lora = 2 * 6 * (4 * 8 + 4 * 8 + 6 * 4 + 5 * 4)
    assert found == {"LoRA": 3 * of_lora, "loss": 3 * 2 * 5 * 11 * 8, "attention": 3.5 * 2 * 4 * 20 * 4}
    frozen = analyse(trace, break_down(trace), {}, replace(known, trains_head=False)).categories
    assert next(row.flops for row in frozen if row.name == "loss") == 2 * 2 * 5 * 11 * 8


def test_attention_that_launches_its_kernel_by_another_operation_has_its_own_shapes() -> None:
    query = [2, 4, 6, 8]  # [B, H, S, K]
    events = [
        op("aten::_scaled_dot_product_flash_attention", 10, 20, dims=[query] * 3, values=["", "", "", "0.", "True"]),
        op("aten::_flash_attention_forward", 11, 19, dims=[[2, 6, 4, 8]] * 3),
        launch(1, 12, 13),
        on_gpu("kernel", "flash_fwd_kernel", 14, 30, 1),
    ]
    assert rows_of([*step(), *events], on_gpu=True)["attention"].flops == 2 * (2 * 4) * 6 * 6 * (8 + 8) / 2


def test_the_rank_that_waits_and_the_one_it_waits_for_are_named() -> None:
    def row(data: float, communication: float) -> list[float]:
        parts = dict.fromkeys(PARTS, 0.0) | {"forward": 0.5, "data wait": data, "communication": communication}
        return [*parts.values(), communication + 0.1]

    ranks = rank_times([row(0.0, 0.4), row(0.3, 0.1), row(0.1, 0.3)])
    assert [rank.waits for rank in ranks] == pytest.approx([0.3, 0.0, 0.2])
    assert [rank.busy for rank in ranks] == pytest.approx([0.5, 0.8, 0.6])
    said = waiting_words(ranks)
    assert said == "Rank 0 waits 300 ms of a step (33.3%) for rank 1, which takes 300 ms longer in: data wait."
    assert waiting_words(rank_times([row(0.1, 0.3)] * 2)).startswith("No rank waits")
    assert waiting_words(ranks[:1]) == ""


def profile_of(*, ranks: int = 1, rows: tuple[Row, ...] = (), **parts: float) -> Profile:
    """A profile of a step of one second."""
    trace = read_trace(step(), on_gpu=True)
    broken = break_down(trace)
    idle = parts.pop("idle_in", None) or {}
    named = {name.replace("_", " "): seconds for name, seconds in parts.items()}
    broken = replace(broken, step=1.0, parts=dict.fromkeys(PARTS, 0.0) | named, idle_in=idle)
    analysis = replace(analyse(trace, broken, {}), categories=list(rows), top=list(rows))
    return Profile("run", (1, 1), analysis, CEILINGS, rank_times([row_of(broken)] * ranks), None)


@pytest.mark.parametrize(
    ("overrides", "found", "fill", "do", "gain"),
    [
        ([], {"data_wait": 0.2}, 1.0, "data.cache_dir=<a folder on a local disk>", 1 / 0.8),
        (["batch.packing=none"], {"forward": 0.2, "backward": 0.4}, 0.5, "batch.packing=best_fit", 1 / 0.7),
        (["memory=recompute"], {"forward": 0.2}, 1.0, "memory=keep", 1 / 0.8),
        (
            ["model.attention=sdpa", "batch.packing=best_fit"],
            {"rows": (Row("attention", "attention", 0.5, 1, 1e8, 0),)},
            1.0,
            "model.attention=auto",
            1 / 0.6,
        ),
        ([], {"idle_in": {"forward": 0.1, "backward": 0.1}}, 1.0, "batch.micro_batch_size=4", 1 / 0.85),
        (["engine=zero3"], {"communication": 0.3, "ranks": 4}, 1.0, "engine=zero2", 1 / 0.9),
        (["engine=zero2"], {"communication": 0.4, "ranks": 2}, 1.0, "engine=zero1", 1 / 0.8),
        (["engine=zero2_offload"], {"idle_in": {"update": 0.5}}, 1.0, "engine.offload_optimizer=none", 2.0),
        (["kernels=off"], {"rows": (Row("loss", "loss", 0.5, 1, 1e8, 0),)}, 1.0, "kernels=auto", 1 / 0.6),
        ([], {"idle_in": {"reporting": 0.1}}, 1.0, "track.every_steps=10", 1 / 0.91),
        (
            ["adapter=lora", "adapter.dropout=0.1"],
            {"rows": (Row("aten::native_dropout", "norm, elementwise", 0.2),)},
            1.0,
            "adapter.dropout=0",
            1 / 0.8,
        ),
    ],
)
def test_advice_names_a_setting_and_the_gain_that_follows_from_the_figures(
    overrides: list[str], found: dict[str, Any], fill: float, do: str, gain: float
) -> None:
    config = compose_config(["+exp=debug", *overrides]).config
    advice = {each.do: each for each in advise(profile_of(**found), config, fill)}
    assert advice[do].gain == pytest.approx(gain)
    assert {each.setting for each in advice.values()} <= schema_keys().keys()
    assert list(advice) == sorted(advice, key=lambda each: -advice[each].gain)
    compose_config(["+exp=debug", *overrides, do.replace("<a folder on a local disk>", "/tmp")])
    nothing = compose_config(["+exp=debug", *overrides]).config
    assert do not in {each.do for each in advise(profile_of(), nothing, 1.0)}  # without those figures


def test_bf16_is_advised_where_this_device_multiplies_faster_in_it() -> None:
    config, gemm = compose_config(["+exp=debug"]).config, Row("GEMM", "GEMM", 0.6)
    made = profile_of(rows=(gemm,))
    assert advise(made, config, 1.0) == []
    made.ceilings = replace(CEILINGS, flops_bf16=4e9)
    (advice,) = advise(made, config, 1.0)
    assert (advice.do, advice.gain) == ("engine.precision=bf16", pytest.approx(1 / 0.55))


def test_what_recording_itself_takes_is_no_gain() -> None:
    config, made = compose_config(["+exp=debug"]).config, profile_of(idle_in={"forward": 0.3, "backward": 0.1})
    made.recording = 0.2
    assert [each.gain for each in advise(made, config, 1.0)] == [pytest.approx(1 / 0.85)]


def test_a_full_gpu_is_not_told_to_hold_more() -> None:
    config = compose_config(["+exp=debug", "memory=recompute"]).config
    made = profile_of(forward=0.2)
    made.analysis.memory = timeline(read_trace([*step(), memory(12, 100, 1, 100, 1)], on_gpu=True), {})
    made.ceilings = replace(CEILINGS, memory_bytes=120)
    assert advise(made, config, 1.0) == []
    made.ceilings = replace(CEILINGS, memory_bytes=1200)
    assert [each.setting for each in advise(made, config, 1.0)] == ["memory.recompute"]


def test_what_a_trace_and_a_config_say_is_escaped_on_the_page() -> None:
    evil = "<script>alert(1)</script>"
    events = [*step(), op(f"aten::{evil}", 10, 30), op(f"aten::{evil}", 35, 39), op("aten::nonzero", 36, 37)]
    trace = read_trace([*events, memory(12, 2**20, 1)], on_gpu=False)
    made = Profile(evil, (1, 1), analyse(trace, break_down(trace), {}), CEILINGS, rank_times([[0.1] * 8] * 2), 0.25)
    page = render(made, [Advice("seed", evil, evil, 2.0)])
    assert "<script" not in page
    assert "http" not in page.replace('http-equiv="Content', "")
    for part in ("What to change", "2.00x", "Ranks", "Memory, 1 MiB", "Waits for the device", "Costliest operations"):
        assert part in page, part
    assert "a step takes 250 ms longer" in page
    assert "largest: 1 x 1 MiB in forward" in page


def test_of_many_ranks_those_that_wait_least_and_most_are_shown() -> None:
    made = profile_of(communication=0.1)
    rows = [[0.1] * 3 + [0.1 + rank / 100] + [0.0] * 3 + [0.1] for rank in range(40)]
    made.ranks = rank_times(rows)
    page = render(made, [])
    assert [rank for rank in range(40) if f"<td>rank {rank}</td>" in page] == [*range(8), *range(32, 40)]
