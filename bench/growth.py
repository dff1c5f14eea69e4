"""How the cost of a step of ours grows: processor seconds and saved bytes along each axis, with fitted exponents.

    python bench/growth.py              about two minutes on two CPU cores
    python bench/growth.py --axes rank  one axis, which writes nothing

A point is a run of the real loop (llama of random weights, LoRA, fp32, packed records of one length). Along an axis one
number changes. Of each point:
    cpu_seconds   processor seconds of a step, the least of a few; all ranks together
    saved_bytes   what the forward keeps for the backward beside the weights; of one rank
    needed        floating-point operations that the step cannot do without, counted from the shapes
    peak_bytes    of the axis of ranks: what training adds to the resident bytes of rank 0
An exponent e of a column means that it grows as (axis)^e: the slope of a straight line through the logarithms. Time
must not grow faster than `needed` does, and bytes not faster than MOST_BYTES says.
"""

import argparse
import json
import math
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from cpu_contestants import our_loop
from cpu_setting import Prepared
from measuring import machine, on_the_cpu, resident

RESULTS = Path(__file__).parent / "results" / "growth.json"
WARM_UP_STEPS, STEPS = 1, 5
TIME_MARGIN, BYTES_MARGIN = 0.15, 0.05  # of an exponent; bytes are counted, their margin is for terms that are constant


@dataclass(frozen=True)
class Point:
    sequence_length: int = 512
    record_tokens: int = 64
    sequences: int = 4  # a step, over all ranks; each rank has its part in one forward
    rank: int = 16
    layers: int = 3
    width: int = 192
    ranks: int = 1

    @property
    def num_tokens(self) -> int:
        return self.sequences * self.sequence_length

    @property
    def num_records(self) -> int:
        return self.num_tokens // self.record_tokens

    @property
    def feed_forward(self) -> int:
        return self.width * 8 // 3

    def needed(self, vocabulary: int, targets: int) -> float:
        """Operations of a step: forward, gradients of activations, gradients of the LoRA matrices; attention inside
        records, causal. A frozen head takes part in target rows alone.
        """
        D, F = self.width, self.feed_forward
        base, lora = 4 * D * D + 3 * D * F, self.rank * (4 * 2 * D + 3 * (D + F))
        attention = 7 * self.num_records * self.record_tokens**2 * D  # products of [t, t] / 2: 2 forward, 5 backward
        return self.layers * (self.num_tokens * (4 * base + 6 * lora) + attention) + 4 * targets * vocabulary * D


AXES: dict[str, tuple[str, list[tuple[int, Point]]]] = {
    "sequence_length": (
        "tokens of a sequence, in records of 64",
        [(length, Point(sequence_length=length)) for length in (256, 512, 1024, 2048)],
    ),
    "record_length": (
        "tokens of a sequence that is one record",
        [(length, Point(sequence_length=length, record_tokens=length)) for length in (256, 512, 1024, 2048)],
    ),
    "records": (
        "records in a sequence of 2,048 tokens",
        [(2048 // each, Point(sequence_length=2048, record_tokens=each)) for each in (1024, 512, 256, 128, 64)],
    ),
    "micro_batch": ("sequences of one forward", [(count, Point(sequences=count)) for count in (1, 2, 4, 8, 16)]),
    "rank": ("rank of LoRA", [(rank, Point(rank=rank)) for rank in (4, 8, 16, 32, 64)]),
    "layers": ("layers of the model", [(layers, Point(layers=layers)) for layers in (2, 4, 8, 16)]),
    "width": ("hidden size of the model", [(width, Point(width=width)) for width in (96, 192, 384, 768)]),
    "ranks": (
        "ranks that share a step, ZeRO 2; processor seconds of all, bytes of one",
        [(ranks, Point(ranks=ranks, width=384)) for ranks in (1, 2, 4)],
    ),
}
# Activations are linear in tokens, layers and width, and know nothing of the records that tokens belong to. Matrices of
# rank r add r numbers a token beside those of the width. Ranks have a share of the tokens each.
MOST_BYTES = {
    "sequence_length": 1.0,
    "record_length": 1.0,
    "records": 0.0,
    "micro_batch": 1.0,
    "rank": 0.5,
    "layers": 1.0,
    "width": 1.0,
    "ranks": -0.9,
}


def exponent(xs: Sequence[float], ys: Sequence[float]) -> float:
    """e of the y = c x^e that fits best."""
    return statistics.linear_regression([math.log(x) for x in xs], [math.log(y) for y in ys]).slope


class Growing(Prepared):
    """Records of one length, of which one step takes all."""

    def __init__(self, point: Point, scratch: Path) -> None:
        from tunesmith.train.config.compose import compose_config
        from tunesmith.train.paths import resolve_path

        self.point = point
        folder = scratch / "model"
        folder.mkdir()
        for path in Path(resolve_path("conf://model/tiny")).iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        shape = {
            "hidden_size": point.width,
            "intermediate_size": point.feed_forward,
            "num_hidden_layers": point.layers,
            "num_attention_heads": point.width // 32,
            "num_key_value_heads": point.width // 32,
            "max_position_embeddings": 4096,
        }
        hf_config = json.loads((folder / "config.json").read_text(encoding="utf-8")) | shape
        self.vocabulary = hf_config["vocab_size"]
        (folder / "config.json").write_text(json.dumps(hf_config), encoding="utf-8")
        super().__init__(compose_config(_overrides(point, folder, scratch)).config, scratch)

    def write_rows(self) -> None:
        empty = len(self.tokenised({"prompt": "7", "completion": "7"})["input_ids"]) - 1
        row = {"prompt": "7", "completion": "7" * (self.point.record_tokens - empty)}  # a digit is a token
        assert len(self.tokenised(row)["input_ids"]) == self.point.record_tokens
        lines = f"{json.dumps(row)}\n" * self.point.num_records
        (self.scratch / "train.jsonl").write_text(lines, encoding="utf-8")


def _overrides(point: Point, model: Path, scratch: Path) -> list[str]:
    return [
        "model=tiny",
        f"model.name_or_path={model}",
        "data=example",
        f"data.train={scratch / 'train.jsonl'}",
        "data.validation=[]",
        f"data.cache_dir={scratch / 'cache'}",
        "adapter=lora",
        f"adapter.r={point.rank}",
        f"engine={'ddp' if point.ranks == 1 else 'zero2'}",
        "engine.precision=fp32",
        "track=none",
        "checkpoint.at_end=false",
        "schedule.epochs=null",
        f"schedule.max_steps={WARM_UP_STEPS + STEPS}",
        "batch.packing=best_fit",
        f"batch.sequence_length={point.sequence_length}",
        f"batch.global_batch_size={point.sequences}",
        f"batch.micro_batch_size={point.sequences // point.ranks}",
    ]


class SavedBytes:
    """Inside, counts the bytes that autograd keeps for the backward, each storage once, weights left out."""

    def __init__(self, model: Any) -> None:
        import torch

        self._weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        self._kept: dict[int, int] = {}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._keep, lambda tensor: tensor)

    def _keep(self, tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._weights:
            self._kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    def __enter__(self) -> "SavedBytes":
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)

    @property
    def total(self) -> int:
        return sum(self._kept.values())


def measure(point: Point) -> dict[str, float]:
    """A point, in this process, which is one of its ranks."""
    import torch

    from tunesmith.train.ranks.distributed import start, world_from_environment
    from tunesmith.train.track.reporter import Reporter

    world = world_from_environment()
    if not torch.distributed.is_initialized():
        start(world, torch.device("cpu"), timeout_minutes=10)
    with tempfile.TemporaryDirectory() as folder:
        prepared = Growing(point, Path(folder))
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        before = resident("VmRSS")
        loop = our_loop(prepared, world, Reporter(None))
        with SavedBytes(loop.session.engine.module) as saved:
            loop.step()
        seconds = []
        for _ in range(STEPS):
            started = time.process_time()
            loop.step()
            seconds.append(time.process_time() - started)
        peak = resident("VmHWM") - before
        loop.close()
    needed = point.needed(prepared.vocabulary, prepared.data.train.num_target_tokens)
    return {"cpu_seconds": min(seconds), "saved_bytes": saved.total, "needed": needed, "peak_bytes": peak}


def measure_on_ranks(point: Point) -> dict[str, float]:
    """The same on ranks of their own processes: seconds of all, bytes of rank 0."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, __file__, "--point", json.dumps(asdict(point))]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(point.ranks)}
    started = [
        subprocess.Popen(
            command, env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}, stdout=subprocess.PIPE
        )
        for rank in range(point.ranks)
    ]
    outputs = [process.communicate()[0].decode() for process in started]
    if any(process.returncode for process in started):
        raise RuntimeError(f"{point} failed.")
    found = [json.loads(output.splitlines()[-1]) for output in outputs]
    return {**found[0], "cpu_seconds": sum(one["cpu_seconds"] for one in found)}


def measure_axis(name: str) -> dict[str, Any]:
    title, points = AXES[name]
    rows = []
    for value, point in points:
        found = measure_on_ranks(point) if name == "ranks" else measure(point)
        rows.append({"at": value, **asdict(point), **found, "tokens": point.num_tokens})
        print(f"{name} {value}: {found['cpu_seconds']:.3f} s, {found['saved_bytes'] / 2**20:.1f} MiB saved", flush=True)
    exponents = fit(rows)
    return {"title": title, "rows": rows, "exponents": exponents, "faster_than_it_must": too_fast(name, exponents)}


def fit(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    at = [row["at"] for row in rows]
    return {name: exponent(at, [row[name] for row in rows]) for name in ("cpu_seconds", "saved_bytes", "needed")}


def too_fast(axis: str, exponents: dict[str, float]) -> list[str]:
    """The columns that grow faster than they must."""
    most = {
        "cpu_seconds": exponents["needed"] + TIME_MARGIN,
        "saved_bytes": MOST_BYTES[axis] + BYTES_MARGIN,
    }
    return [column for column, limit in most.items() if exponents[column] > limit]


def main() -> None:
    on_the_cpu()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--axes", help=f"of {', '.join(AXES)}, separated by commas; all without it")
    parser.add_argument("--point", help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, default=RESULTS, help="where the JSON goes")
    options = parser.parse_args()
    if options.point:
        print(json.dumps(measure(replace(Point(), **json.loads(options.point)))))
        return
    names = options.axes.split(",") if options.axes else list(AXES)
    if unknown := set(names) - set(AXES):
        parser.error(f"there is no axis {', '.join(sorted(unknown))}; there are {', '.join(AXES)}.")
    axes = {name: measure_axis(name) for name in names}
    if not options.axes:
        found = {
            "what": "growth of the cost of a step: LoRA, fp32, CPU",
            "command": "python bench/growth.py",
            "machine": machine(("torch", "deepspeed", "transformers", "peft")),
            "margins": {"cpu_seconds": TIME_MARGIN, "saved_bytes": BYTES_MARGIN},
            "most_bytes": MOST_BYTES,
            "axes": axes,
        }
        options.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    for name, axis in axes.items():
        fitted = ", ".join(f"{column} {value:.2f}" for column, value in axis["exponents"].items())
        print(f"{name}: {fitted}{' GROWS TOO FAST: ' if axis['faster_than_it_must'] else ''}"
              f"{', '.join(axis['faster_than_it_must'])}")  # fmt: skip
    if any(axis["faster_than_it_must"] for axis in axes.values()):
        sys.exit("something grows faster than it must.")


if __name__ == "__main__":
    main()
