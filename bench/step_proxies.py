"""What a step costs whatever the machine's mood: waits for the device, whole masks, bytes kept, launches, data passes.

    python bench/step_proxies.py [--list]        ends with one line: step: syncs=... dense_masks=... ...

Counted on a CPU, in the real loop, by what torch is asked to do (a dispatch mode sees each operation of forward,
backward and update): three layers of a llama (conf/model/tiny), LoRA, packed records, two forwards a step, ZeRO 2.
    syncs              operations that give the host a number of the device: item, nonzero and the like, and tolist
    dense_masks        tensors made whose last two sides are a sequence's length
    saved_bytes_error  what is foreseen of the bytes a forward keeps, against what the live model keeps
    launches           operations that write something: neither views nor allocations; on a GPU fewer, as one of our
                       kernels stands for several operations of its torch back end
"""

import argparse
import os
import tempfile
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["DS_ACCELERATOR"] = "cpu"

import torch
from torch.utils._python_dispatch import TorchDispatchMode

SEQUENCE_LENGTH = 136  # a side that nothing else has
WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2", "unique_dim", "bincount"}
ALLOCATES = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "lift_fresh"}
FORWARDS = 2
LIBRARIES = ("tunesmith", "deepspeed", "transformers", "peft")
# What reads a tensor where that is free, and on a GPU only if TUNESMITH_DEBUG=1: kernels/lce/linear_cross_entropy.py.
ON_A_CPU_ALONE = ("tunesmith/kernels/lce/checks.py",)


@dataclass
class Counted:
    """What one step asked of torch."""

    operations: Counter[str] = field(default_factory=Counter)
    waits: Counter[str] = field(default_factory=Counter)  # by the place in the code
    dense_masks: int = 0
    data_passes: int = 0

    def wait(self, place: str) -> None:
        if not place.startswith(ON_A_CPU_ALONE):
            self.waits[place] += 1

    @property
    def launches(self) -> int:
        return sum(self.operations.values())


class Counting(TorchDispatchMode):
    """Counts operations by name while it is on."""

    def __init__(self, counted: Counted) -> None:
        super().__init__()
        self._counted = counted

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in WAITS or (name == "index" and any(_is_bool(it) for it in args[1])):
            self._counted.wait(_place())
        elif not func.is_view and name not in ALLOCATES:
            self._counted.operations[name] += 1
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor) and tuple(tensor.shape[-2:]) == (SEQUENCE_LENGTH, SEQUENCE_LENGTH):
                self._counted.dense_masks += 1
        return result


def _is_bool(tensor: Any) -> bool:
    return isinstance(tensor, torch.Tensor) and tensor.dtype == torch.bool


def _place() -> str:
    """Where in this project or a library of its model or engine a wait is."""
    for frame in reversed(traceback.extract_stack()[:-2]):
        for library in LIBRARIES:
            _, found, path = frame.filename.rpartition(f"/{library}/")
            if found and "/bench/" not in frame.filename:
                return f"{library}/{path}:{frame.lineno} {frame.name}"
    return "elsewhere"


@contextmanager
def counting(store: Any) -> Iterator[Counted]:
    """Counts what is done inside, tolist and the batches of a store included."""
    counted, tolist, batch = Counted(), torch.Tensor.tolist, store.batch

    def counted_tolist(tensor: torch.Tensor) -> Any:
        counted.wait(_place())
        return tolist(tensor)

    def counted_batch(*args: Any, **given: Any) -> Any:
        counted.data_passes += 1
        return batch(*args, **given)

    torch.Tensor.tolist, store.batch = counted_tolist, counted_batch  # type: ignore[method-assign]
    try:
        with Counting(counted):
            yield counted
    finally:
        torch.Tensor.tolist, store.batch = tolist, batch  # type: ignore[method-assign]


def overrides(scratch: Path) -> list[str]:
    return [
        "model=tiny", "data=example", "data.validation=[]", f"data.cache_dir={scratch / 'cache'}", "adapter=lora",
        "engine=zero2", "engine.precision=bf16", "track=none", "checkpoint.at_end=false", "schedule=constant",
        "schedule.epochs=null", "schedule.max_steps=8", f"batch.sequence_length={SEQUENCE_LENGTH}", "kernels=torch",
        f"batch.global_batch_size={2 * FORWARDS}", "batch.micro_batch_size=2", "data.truncate=drop",
    ]  # fmt: skip


def count_step(scratch: Path) -> tuple[Counted, float]:
    """One step after two others, and the error of the bytes foreseen: a share of those kept."""
    from tunesmith.train.config.compose import compose_config
    from tunesmith.train.data.prepare import prepare
    from tunesmith.train.data.tokenizer import load_tokenizer
    from tunesmith.train.model.activations import count_activations, predict_activations
    from tunesmith.train.model.load import check_model
    from tunesmith.train.model.packing import settle
    from tunesmith.train.objective.objective import make_objective
    from tunesmith.train.ranks.distributed import World, start
    from tunesmith.train.run.loop import Loop
    from tunesmith.train.run.setup import make_run, open_session
    from tunesmith.train.track.reporter import Reporter

    class Silent(Reporter):
        def step(self, *args: Any, **rest: Any) -> None:
            pass

    device, config = torch.device("cpu"), compose_config(overrides(scratch)).config
    if not torch.distributed.is_initialized():
        start(World(), device, timeout_minutes=10)
    hf_config = check_model(config)
    settle(config, hf_config, device, print)
    tokenizer = load_tokenizer(config.model, config.data)
    objective = make_objective(config, tokenizer)
    data = prepare(config, tokenizer, objective, show_progress=False)
    parts: dict[str, Any] = {"tokenizer": tokenizer, "objective": objective, "data": data}
    run = make_run(config, World(), device, scratch / "run", kernels=config.kernels, reporter=Silent(None), **parts)
    loop = Loop(run, open_session(run))
    loop.stop.begin()
    loop.step()
    loop.step()
    with counting(data.train) as counted:
        loop.step()
    batch = run.feed.batches(0)[0]
    model = loop.session.engine.module
    exact = count_activations(model, batch.inputs, batch.segments)
    foreseen, _ = predict_activations(config, hf_config, 2)
    loop.close()
    return counted, abs(foreseen.kept(0) / exact.kept(0) - 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--list", action="store_true", help="also each wait with its place, and operations by name")
    with tempfile.TemporaryDirectory() as scratch:
        listed = parser.parse_args().list
        counted, error = count_step(Path(scratch))
    if listed:
        for place, number in counted.waits.most_common():
            print(f"wait x {number}: {place}")
        for name, number in counted.operations.most_common():
            print(f"{number:5d} {name}")
    print(
        f"step: syncs={sum(counted.waits.values())} dense_masks={counted.dense_masks} "
        f"saved_bytes_error={error:.4f} launches={counted.launches}"
    )


if __name__ == "__main__":
    main()
