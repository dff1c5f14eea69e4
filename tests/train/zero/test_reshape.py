"""A run goes on with other ranks or another ZeRO stage, and its losses are those of the run that was left alone."""

import hashlib
import itertools
import json
import os
import resource
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from matrices import covered

from tunesmith.train.checkpoint import conversion
from tunesmith.train.errors import TrainingError
from tunesmith.train.ranks.distributed import World
from tunesmith.train.zero import shards

NUM_STEPS = 12
TOLERANCE = 1e-6

# No size of it divides by four: every stage pads, and cuts parameters where no row ends.
UNEVEN = {
    "hidden_size": 30,
    "intermediate_size": 61,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 10,
}

OverridesOf = Callable[..., list[str]]


@pytest.fixture(scope="module")
def overrides_of(short_run: Callable[..., list[str]], make_model: Callable[..., Path]) -> OverridesOf:
    """Overrides of a run with two groups of parameters, without dropout, which each rank draws for itself."""
    own = ["schedule=cosine", "optimizer.weight_decay=0.1", "checkpoint.every_steps=null"]
    return lambda stage, *more: short_run(stage, NUM_STEPS, *own, *more, model=make_model(**UNEVEN))


def piece(rank: Any, overrides: list[str], run_dir: str, num_steps: int, source: str | None = None) -> dict[str, Any]:
    """On every rank: some steps from a checkpoint on, or from the start, and then a checkpoint of their end."""

    more = [f"resume.source={source}"] if source else []
    with rank.ready([*overrides, *more], run_dir) as (loop, recorder):
        optimizer = loop.session.engine._engine.optimizer
        settings = ("weight_decay", "betas", "eps")
        answer: dict[str, Any] = {
            "converted": bool(conversions(loop.run.run_dir)),
            "groups": [{key: group[key] for key in settings} for group in optimizer.param_groups],
            "clip": getattr(optimizer, "clip_grad", None),
            "learned": [],
        }
        for _ in range(num_steps):
            rows = [row for batch in loop.run.feed.batches(loop.session.state.step) for row in batch.labels]
            answer["learned"].append([digest for row in rows if (digest := digest_of_learned(row))])
            loop.step()
        saved = loop.session.checkpoints.save(loop.session.engine, loop.session.state)
        answer["left"] = bool(conversions(loop.run.run_dir))
        return answer | {"losses": recorder.losses, "saved": str(saved)}


def conversions(run_dir: Path) -> list[Path]:
    return sorted(run_dir.glob(".tunesmith-universal-*"))


def digest_of_learned(row: Any) -> str:
    """Of what a sequence teaches, whatever the padding; empty for a sequence that only fills a batch up."""
    learned = [(place, token) for place, token in enumerate(row.tolist()) if token >= 0]
    return hashlib.sha256(repr(learned).encode()).hexdigest()[:12] if learned else ""


Shape = tuple[Any, ...]  # ranks, ZeRO stage, and overrides of that piece alone


class Runs:
    """Runs in pieces, each with its own ranks and stage."""

    def __init__(self, ranks: Callable[[int], Any], overrides_of: OverridesOf, folder: Path) -> None:
        self._ranks = ranks
        self._overrides_of = overrides_of
        self._folder = folder
        self._alone: dict[str, dict[str, Any]] = {}

    def alone(self, shape: Shape, *more: str) -> dict[str, Any]:
        """The run of one shape that nobody touched."""
        key = f"{shape} {more}"
        if key not in self._alone:
            self._alone[key] = self.through([shape], *more)
        return self._alone[key]

    def through(self, shapes: list[Shape], *more: str) -> dict[str, Any]:
        """Two steps in each of the shapes, and the rest in the last: losses, labels of each global batch, groups."""
        steps = [2] * (len(shapes) - 1)
        losses: list[float] = []
        learned: list[list[str]] = []
        answer: dict[str, Any] = {"saved": None}
        for shape, num_steps in zip(shapes, [*steps, NUM_STEPS - sum(steps)], strict=True):
            answer = self.piece(shape, num_steps, answer["saved"], *more)
            losses += answer["losses"]
            learned += answer["learned"]
        return answer | {"losses": losses, "learned": learned}

    def piece(self, shape: Shape, num_steps: int, source: str | None, *more: str) -> dict[str, Any]:
        world_size, stage, *own = shape
        answers = self._ranks(world_size).run(
            piece,
            overrides=[*self._overrides_of(stage, *more), *own],
            run_dir=tempfile.mkdtemp(dir=self._folder),
            num_steps=num_steps,
            source=source,
        )
        assert all(answer["losses"] == answers[0]["losses"] for answer in answers)
        of_steps = zip(*(answer["learned"] for answer in answers), strict=True)
        return answers[0] | {"learned": [sorted(itertools.chain(*of_step)) for of_step in of_steps]}


@pytest.fixture(scope="module")
def runs(ranks: Callable[[int], Any], overrides_of: OverridesOf, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(ranks, overrides_of, tmp_path_factory.mktemp("reshape"))


def assert_same(found: dict[str, Any], alone: dict[str, Any]) -> float:
    """The largest difference of two losses of the same step."""
    assert len(found["losses"]) == NUM_STEPS
    worst = max(abs(loss - expected) for loss, expected in zip(found["losses"], alone["losses"], strict=True))
    assert worst <= TOLERANCE
    assert found["learned"] == alone["learned"]
    assert found["groups"] == alone["groups"]
    assert [group["weight_decay"] for group in found["groups"]] == [0.1, 0.0]
    return worst


ROUND = (2, 4, 1, 2)
ADAPTERS = {
    "none": ["adapter=none"],
    "dora": ["adapter=lora", "adapter.use_dora=true"],  # its magnitudes are vectors: a group without decay
    "last_layers": ["adapter=last_layers", "adapter.num_layers=1"],
}
CHAINS = [
    ("dora", [(2, 2), (1, 3)]),
]
TORTURE = [
    ("none", [(1, 3), (2, 1)]),
    ("last_layers", [(2, 2), (2, 3), (1, 1), (4, 0), (1, 2)]),
    ("dora", [(world, 3) for world in ROUND]),
    *((adapter, [(world, stage) for world in ROUND]) for stage in (1, 2) for adapter in ("none", "dora")),
    ("none", [(world, 3) for world in ROUND]),
    *((adapter, [(2, 2), (2, 3)]) for adapter in ("none", "dora")),
]
WIDE = [
    *((adapter, [(world, stage) for world in ROUND]) for stage in range(4) for adapter in ADAPTERS),
    *(
        (adapter, [(2, first), (world, second)])
        for first, second in itertools.permutations(range(4), 2)
        for world, adapter in ((2, "none"), (4, "dora"))
    ),
]


def named(chains: list[tuple[str, list[Shape]]], **more: Any) -> list[Any]:
    """Parameters under names such as dora-2x3-4x3: ranks x stage."""
    return [
        pytest.param(adapter, shapes, id="-".join([adapter, *(f"{world}x{stage}" for world, stage in shapes)]), **more)
        for adapter, shapes in chains
    ]


@pytest.mark.row(18)
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("adapter", "shapes"),
    [
        *named(CHAINS),
        *named(TORTURE, marks=pytest.mark.torture),
        *named([chain for chain in WIDE if chain not in CHAINS + TORTURE], marks=pytest.mark.slow),
    ],
)
def test_losses_are_those_of_the_run_left_alone(
    runs: Runs, happened: Callable[[str], None], adapter: str, shapes: list[Shape]
) -> None:
    worst = assert_same(runs.through(shapes, *ADAPTERS[adapter]), runs.alone((2, shapes[0][1]), *ADAPTERS[adapter]))
    happened(f"{adapter} {' -> '.join(f'{world} ranks ZeRO {stage}' for world, stage in shapes)}: {worst:.1g}")


@pytest.mark.slow
def test_another_micro_batch_needs_no_conversion(runs: Runs) -> None:
    found = runs.through([(2, 2), (2, 2, "batch.micro_batch_size=4"), (2, 2, "batch.micro_batch_size=1")])
    assert not found["converted"]
    assert_same(found, runs.alone((2, 2)))


def whole(saved: str, folder: Path) -> dict[str, Any]:
    """All that a checkpoint says of each trained parameter, down to the digests of its numbers."""
    target = Path(tempfile.mkdtemp(dir=folder)) / "whole"
    shards.convert(Path(saved) / "engine", target)
    index = json.loads((target / "index.json").read_text(encoding="utf-8"))
    digests = index.pop("digests")
    for parameter in index["parameters"].values():
        parameter["digest"] = digests[parameter.pop("file")]
    return index | {"buffers": digests.get("buffers.safetensors")}


BITWISE = {
    "bf16 in short": [(2, 1), (1, 3)],
    "fp32": [(2, 3), (4, 2), (1, 0), (2, 1), (4, 3), (2, 0)],
    # two micro batches a step on two ranks, one on four: at stage 1 another optimizer of DeepSpeed's each time
    "bf16": [(2, 1), (4, 1), (2, 3), (1, 0), (2, 1), (4, 2)],
    "fp16": [(2, 2), (4, 3), (1, 0), (2, 1), (1, 3)],
}


@pytest.mark.row(18)
@pytest.mark.timeout(600)
@pytest.mark.parametrize("chain", covered(BITWISE, [], ["bf16 in short", "bf16"]))
def test_state_is_bitwise_the_same_in_every_shape(runs: Runs, tmp_path: Path, chain: str) -> None:
    """Weights, moments, numbers of updates, loss scale, counters."""
    first, *others = BITWISE[chain]
    precision = chain.split()[0]
    answer = runs.piece(first, 2, None, f"engine.precision={precision}")
    expected = whole(answer["saved"], tmp_path)
    assert all(parameter["updates"] == 2 for parameter in expected["parameters"].values())
    assert bool(expected["loss_scale"]) == (precision == "fp16")
    for shape in others:
        answer = runs.piece(shape, 0, answer["saved"], f"engine.precision={precision}")
        assert answer["converted"]
        assert not answer["left"]
        assert whole(answer["saved"], tmp_path) == expected, shape


@pytest.mark.parametrize("shape", [pytest.param((2, 2), marks=pytest.mark.slow), (1, 3)])
def test_settings_that_may_differ_are_those_of_the_config(runs: Runs, shape: Shape) -> None:
    saved = runs.piece((2, 2), 1, None)["saved"]
    changed = ["optimizer.weight_decay=0.3", "optimizer.eps=1e-6", "optimizer.max_grad_norm=0.25"]
    allowed = "resume.allow=[optimizer.weight_decay,optimizer.eps,optimizer.max_grad_norm]"
    found = runs.piece(shape, 0, saved, *changed, allowed)
    assert found["converted"] == (shape != (2, 2))
    assert [(group["weight_decay"], group["eps"]) for group in found["groups"]] == [(0.3, 1e-6), (0.0, 1e-6)]
    assert found["clip"] == 0.25


@pytest.fixture(scope="module")
def saved(runs: Runs) -> Path:
    """A checkpoint of two ranks at stage 2."""
    return Path(runs.piece((2, 2), 1, None)["saved"])


def begin(saved: Path, run_dir: Path) -> conversion.Conversion:
    return conversion.start(saved, saved / "engine", run_dir, World())


CPU = torch.device("cpu")
KILL = "kill:phase=converting the checkpoint,step=5"  # at its sixth parameter


def test_a_conversion_that_hangs_is_given_up_and_ended(tmp_path: Path) -> None:
    process = subprocess.Popen(["sleep", "600"], stderr=subprocess.PIPE, text=True)
    hanging = conversion.Conversion(tmp_path / "step-000004", tmp_path / "target", process)
    with pytest.raises(TrainingError, match=r"not done in 0.01 minutes \(cluster.start_timeout_minutes\)"):
        hanging.wait(CPU, minutes=0.01)
    assert process.returncode == -signal.SIGKILL


def test_a_conversion_that_is_there_is_taken_again_and_a_damaged_one_is_not(saved: Path, tmp_path: Path) -> None:
    target = begin(saved, tmp_path).wait(CPU, minutes=4)
    made = (target / "index.json").stat().st_mtime_ns
    assert begin(saved, tmp_path).wait(CPU, minutes=4) == target
    assert (target / "index.json").stat().st_mtime_ns == made
    file = target / "00003.safetensors"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    assert begin(saved, tmp_path).wait(CPU, minutes=4) == target
    assert (target / "index.json").stat().st_mtime_ns > made
    assert shards.is_whole(target)


def test_one_that_is_killed_leaves_nothing_that_is_used(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TUNESMITH_FAULTS", KILL)
    with pytest.raises(TrainingError, match="ended by SIGKILL"):
        begin(saved, tmp_path).wait(CPU, minutes=4)
    left = conversions(tmp_path)
    assert len(left) == 1
    assert ".staged-" in left[0].name
    monkeypatch.delenv("TUNESMITH_FAULTS")
    target = begin(saved, tmp_path).wait(CPU, minutes=4)
    assert conversions(tmp_path) == [target]
    assert shards.is_whole(target)


def test_a_full_disk_is_one_line_and_leaves_nothing(saved: Path, tmp_path: Path) -> None:
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, unlimited[1]))  # the embedding is larger
    try:
        started = begin(saved, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    with pytest.raises(TrainingError) as caught:
        started.wait(CPU, minutes=4)
    assert "File too large" in caught.value.what
    assert "\n" not in caught.value.what
    assert conversions(tmp_path) == []


class Payload:
    """Runs a command where a pickle is read without a list of what it may hold."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return Path.touch, (self.canary,)


@pytest.mark.row(28)
@pytest.mark.parametrize("name", ["zero_pp_rank_1_mp_rank_00_optim_states.pt", "mp_rank_00_model_states.pt"])
def test_a_shard_that_would_run_code_is_refused(saved: Path, tmp_path: Path, name: str) -> None:
    hostile = Path(shutil.copytree(saved, tmp_path / "hostile"))
    file, canary = hostile / "engine" / name, tmp_path / "canary"
    torch.save(torch.load(file, weights_only=False) | {"planted": Payload(canary)}, file)  # noqa: TS001 - writes the attack
    torch.load(file, weights_only=False)  # noqa: TS001 - the control
    assert canary.exists()  # it is live
    canary.unlink()
    with pytest.raises(TrainingError, match=r"holds builtins\.getattr.*could run code; nothing of it was run"):
        begin(hostile, tmp_path).wait(CPU, minutes=4)
    assert not canary.exists()
    assert conversions(tmp_path) == []


def fails(rank: Any, overrides: list[str], run_dir: str, source: str, faults: str) -> str:
    """On every rank: what a start says when rank 0's conversion is ended."""
    from tunesmith.train.errors import TrainingError as Raised

    os.environ["TUNESMITH_FAULTS"] = faults  # read by the process that converts; this one has read its own
    try:
        with rank.ready([*overrides, f"resume.source={source}"], run_dir):
            return "it went on"
    except Raised as error:
        return error.what
    finally:
        del os.environ["TUNESMITH_FAULTS"]


def test_every_rank_hears_that_it_failed(
    ranks: Callable[[int], Any], overrides_of: OverridesOf, saved: Path, tmp_path: Path
) -> None:
    said = ranks(4).run(
        fails,
        overrides=overrides_of(2),
        run_dir=str(tmp_path / "run"),
        source=str(saved),
        faults=KILL,
    )
    assert len(set(said)) == 1
    assert "could not be converted" in said[0]
    assert "SIGKILL" in said[0]


def with_a_buffer(rank: Any, overrides: list[str], then: list[str], run_dir: str) -> list[float]:
    """A buffer that was saved before the first step, after the checkpoint was converted for another stage."""
    with rank.ready(overrides, f"{run_dir}/first") as (loop, _):
        loop.session.engine.module.register_buffer("router_bias", torch.full((3,), 7.0))
        saved = loop.session.checkpoints.save(loop.session.engine, loop.session.state)
    with rank.ready(then, f"{run_dir}/second") as (loop, _):
        loop.session.engine.module.register_buffer("router_bias", torch.zeros(3))
        loop.session.engine.load_converted(
            conversion.start(saved, saved / "engine", loop.run.run_dir, rank.world).wait(CPU, minutes=4)
        )
        assert not loop.session.engine._engine.basic_optimizer.state  # no update yet, so no moments
        return loop.session.engine.module.router_bias.tolist()


@pytest.mark.parametrize("stages", [pytest.param((2, 3), marks=pytest.mark.slow), (3, 1)])
def test_persistent_buffers_are_taken_along(
    ranks: Callable[[int], Any], overrides_of: OverridesOf, tmp_path: Path, stages: tuple[int, int]
) -> None:
    first, then = (overrides_of(stage) for stage in stages)
    found = ranks(1).run(with_a_buffer, overrides=first, then=then, run_dir=str(tmp_path))
    assert found == [[7.0] * 3]
