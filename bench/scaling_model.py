"""What ZeRO puts on the wire, and from which batch on it hides behind compute: the tables of docs/scaling.md.

    python bench/scaling_model.py           prints the tables
    python bench/scaling_model.py --write   puts them into docs/scaling.md, between its marks

A model, not a measurement: no figure here was taken on several GPUs. Assumptions stand in docs/scaling.md.
N ranks, P parameters, T trained ones, A forwards a step (accumulation), all bytes those that one rank sends.
"""

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "scaling.md"
BF16, FP32 = 2, 4
GPUS = (8, 64, 256, 1024)
GPUS_A_NODE = 8
GATHERS_A_BLOCK = 7  # ZeRO 3 gathers each matrix of a block by itself
GOOD_BUCKET = 50e6  # train/zero/deepspeed_config.py


@dataclass(frozen=True)
class Model:
    name: str
    parameters: float
    lora: float  # trained by LoRA of rank 16 on every linear layer
    layers: int
    ends: float  # embeddings and head


@dataclass(frozen=True)
class Link:
    """Bytes a second that a rank sends, and seconds of one small collective."""

    name: str
    rate: float
    latency: Callable[[int], float]


MODELS = (
    Model("1B", 1.24e9, 11.3e6, 16, 0.263e9),
    Model("8B", 8.03e9, 41.9e6, 32, 1.05e9),
    Model("70B", 70.6e9, 207e6, 80, 2.1e9),
)
NVLINK_RATE = 360e9  # 450 GB/s each way, of which NCCL's collectives reach about 80 %
FLOPS = 400e12  # bf16 a second that training reaches on an H100 or H200, half of what its products alone do


def between_nodes(gbits_a_node: float) -> float:
    """Bytes a second that a rank sends in a collective over nodes: NCCL lays as many rings as a node has adapters, so
    that of a rank's bytes an eighth leaves its node on average; 90 % of the adapters' rate.
    """
    return min(NVLINK_RATE, 0.9 * gbits_a_node / 8 * 1e9)


def _latency(ranks: int) -> float:
    """Of a small collective: 20 us in a node, and 10 us for each level of a tree of nodes."""
    nodes = ranks // GPUS_A_NODE
    return 20e-6 + (10e-6 * math.log2(nodes) if nodes > 1 else 0.0)


NVLINK = Link("NVLink", NVLINK_RATE, _latency)
FAST = Link("8 x 400 Gbit/s a node", between_nodes(8 * 400), _latency)
SLOW = Link("1 x 400 Gbit/s a node", between_nodes(400), _latency)


def links(ranks: int) -> tuple[Link, ...]:
    """Of which the slowest one that a collective over all ranks passes decides."""
    return (NVLINK,) if ranks <= GPUS_A_NODE else (FAST, SLOW)


def gradient_bytes(stage: int, trained: float, ranks: int, accumulation: int) -> float:
    """Of the sums over ranks, in fp32 (communication_data_type). ZeRO 1 and 2 all-reduce whole buckets
    (use_multi_rank_bucket_allreduce), ZeRO 3 reduce-scatters. ZeRO 1 sums once a step, 2 and 3 in every forward's
    backward.
    """
    share = (ranks - 1) / ranks
    passes = 1 if stage < 2 else accumulation
    return (1 if stage == 3 else 2) * share * FP32 * trained * passes


def gathered_in_backward(parameters: float, ends: float, *, lora: bool) -> float:
    """Parameters that ZeRO 3 gathers for a backward: frozen ends have no gradient to compute, and the loss keeps what
    it needs of the head.
    """
    return parameters - ends if lora else parameters


def weight_bytes(stage: int, trained: float, gathered: float, ranks: int, accumulation: int) -> float:
    """Of gathering weights, bf16: ZeRO 1 and 2 what was trained, after the update; ZeRO 3 all, for the forward and the
    backward of every micro batch (gathered: of both together). Parameters below stage3_param_persistence_threshold are
    left out: they are under a thousandth.
    """
    return (ranks - 1) / ranks * BF16 * (trained if stage < 3 else accumulation * gathered)


def step_bytes(stage: int, model: Model, ranks: int, *, lora: bool, accumulation: int = 1) -> float:
    trained = model.lora if lora else model.parameters
    gathered = model.parameters + gathered_in_backward(model.parameters, model.ends, lora=lora)
    return gradient_bytes(stage, trained, ranks, accumulation) + weight_bytes(
        stage, trained, gathered, ranks, accumulation
    )


def forward_break_even(stage: int, model: Model, ranks: int, link: Link) -> float:
    """Tokens of a micro batch of a rank from which its forward takes as long as the gathers of its weights."""
    if stage < 3:
        return 0.0
    gathered = (ranks - 1) / ranks * BF16 * model.parameters
    return _seconds(gathered, GATHERS_A_BLOCK * model.layers, ranks, link) * FLOPS / (2 * model.parameters)


def backward_break_even(stage: int, model: Model, ranks: int, link: Link, *, lora: bool) -> float:
    """The same of the backward, which sums gradients, and gathers weights again under ZeRO 3. It computes the gradients
    of activations, and of the trained weights.
    """
    trained = model.lora if lora else model.parameters
    moved, collectives = gradient_bytes(stage, trained, ranks, 1), max(1.0, trained / GOOD_BUCKET)
    if stage == 3:
        moved += (ranks - 1) / ranks * BF16 * gathered_in_backward(model.parameters, model.ends, lora=lora)
        collectives += GATHERS_A_BLOCK * model.layers
    return _seconds(moved, collectives, ranks, link) * FLOPS / (2 * model.parameters + 2 * trained)


def _seconds(moved: float, collectives: float, ranks: int, link: Link) -> float:
    return moved / link.rate + collectives * link.latency(ranks)


def break_even_tokens(stage: int, model: Model, ranks: int, link: Link, *, lora: bool) -> float:
    """Tokens of a micro batch of a rank from which all that can hide behind its compute does. Attention is left out:
    it only lets more hide.
    """
    return max(forward_break_even(stage, model, ranks, link), backward_break_even(stage, model, ranks, link, lora=lora))


def exposed_seconds(stage: int, model: Model, ranks: int, link: Link, *, lora: bool) -> float:
    """Of a step, whatever its batch: ZeRO 1 and 2 gather what was trained after the update, when nothing computes."""
    if stage == 3:
        return 0.0
    trained = model.lora if lora else model.parameters
    return _seconds(weight_bytes(stage, trained, 0.0, ranks, 1), 1, ranks, link)


def good_bucket(link: Link, ranks: int, efficiency: float = 0.9) -> float:
    """Elements of a bucket whose bytes take so much of the time of its all-reduce: the rest is latency."""
    return efficiency / (1 - efficiency) * link.latency(ranks) * link.rate / (2 * FP32)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|", *(f"| {' | '.join(row)} |" for row in rows)]
    return "\n".join(lines) + "\n"


def bytes_table() -> str:
    rows = [
        [model.name, "LoRA" if lora else "full", f"{ranks:,}"]
        + [f"{step_bytes(stage, model, ranks, lora=lora) / 1e9:,.3f} GB" for stage in (1, 2, 3)]
        + [f"{step_bytes(stage, model, ranks, lora=lora, accumulation=4) / 1e9:,.3f} GB" for stage in (1, 2, 3)]
        for model in MODELS
        for lora in (True, False)
        for ranks in (8, 1024)
    ]
    head = ["model", "", "GPUs", "ZeRO 1", "ZeRO 2", "ZeRO 3", "1, 4 forwards", "2, 4 forwards", "3, 4 forwards"]
    return table(head, rows)


def break_even_table() -> str:
    rows = [
        [model.name, "LoRA" if lora else "full", f"{ranks:,}", link.name]
        + [f"{break_even_tokens(stage, model, ranks, link, lora=lora):,.0f}" for stage in (2, 3)]
        + [f"{1e3 * exposed_seconds(2, model, ranks, link, lora=lora):,.2f} ms"]
        for model in MODELS
        for lora in (True, False)
        for ranks in (8, 64, 1024)
        for link in links(ranks)
    ]
    return table(["model", "", "GPUs", "link", "ZeRO 1 and 2", "ZeRO 3", "after the update, ZeRO 1 and 2"], rows)


def bucket_table() -> str:
    rows = [
        [f"{ranks:,}", link.name, f"{1e6 * link.latency(ranks):.0f} us", f"{good_bucket(link, ranks) / 1e6:.1f} M",
         f"{1e3 * 2 * FP32 * good_bucket(link, ranks) / link.rate:.2f} ms"]
        for ranks in GPUS
        for link in links(ranks)
    ]  # fmt: skip
    return table(["GPUs", "link", "latency", "elements for 90 % of the rate", "time of such a bucket"], rows)


TABLES = {"bytes": bytes_table, "break-even": break_even_table, "buckets": bucket_table}


def with_tables(page: str) -> str:
    """The page with each table between its marks. Raises ValueError where a mark is missing."""
    for name, make in TABLES.items():
        begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->\n"
        start, stop = page.index(begin) + len(begin), page.index(end)
        page = page[:start] + make() + page[stop:]
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the tables into docs/scaling.md")
    options = parser.parse_args()
    if options.write:
        PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        print("\n".join(make() for make in TABLES.values()))


if __name__ == "__main__":
    main()
