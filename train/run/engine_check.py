"""The engine's gradients on two ranks against one process in float64: what a new version of DeepSpeed may break.

    python -m tunesmith.train.run.engine_check [--quick]

A tiny model is trained for one step by the engine that runs use, on two CPU processes, for each combination of ZeRO
stage, accumulation, weights used twice, number format and adapter. DeepSpeed 0.17.6 to 0.18.2 gave ZeRO 2 a part of the
gradient, 0.18.3 to 0.19.3 another one to weights that are used twice: with losses as they should be. A start with
versions that nobody has tried runs the quick form as a process of its own (versions_check.py). On the CPU also where
there are GPUs: the ranks hold those, one may be all there is, and what was wrong in both was the same Python there.
"""

import argparse
import hashlib
import itertools
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from tunesmith.train.errors import TunesmithError

WORLD_SIZE = 2
WRONG = 3  # exit code: a gradient is wrong, and the lines before the last one say where
FINDINGS, ERROR = "findings.jsonl", "error."
SEQUENCES, TOKENS, VOCABULARY = 8, 12, 64
LAUNCHERS = ("SLURM_", "TORCHELASTIC_", "OMPI_", "PMI", "MASTER_", "TUNESMITH_")  # of the run that asks
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "DS_ACCELERATOR": "cpu",
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
    "GLOO_SOCKET_IFNAME": "lo",
}
# Of the whole gradient's size. fp32 rounds by 6e-8; bf16 by 4e-3, once in each layer of the model, and the wrong
# gradients this is about were off by 0.3 and more.
TOLERANCE = {"fp32": 1e-4, "bf16": 5e-2}


@dataclass(frozen=True)
class Combination:
    """reuse: used twice is a block that both layers share, and a head that is the embedding; recomputed, the same with
    gradient checkpointing. With lora every weight that is trained is a matrix: the group that does not decay is empty.
    """

    stage: int
    accumulation: int = 1
    reuse: str = "used once"
    precision: str = "fp32"
    adapter: str = "none"

    def __str__(self) -> str:
        return (
            f"ZeRO {self.stage}, accumulation {self.accumulation}, weights {self.reuse}, {self.precision}, "
            f"adapter {self.adapter}"
        )


ALL = [
    Combination(*point)
    for point in itertools.product(
        (0, 1, 2, 3), (1, 4), ("used once", "used twice", "recomputed"), ("fp32", "bf16"), ("none", "lora")
    )
]
# Each stage meets each other setting, and each number format each use.
QUICK = [
    Combination(0, 4, "used twice", "bf16", "none"),
    Combination(0, 1, "recomputed", "fp32", "lora"),
    Combination(1, 4, "recomputed", "bf16", "lora"),
    Combination(1, 1, "used twice", "fp32", "none"),
    Combination(2, 4, "used once", "fp32", "none"),
    Combination(2, 1, "used twice", "bf16", "lora"),
    Combination(2, 4, "recomputed", "bf16", "none"),
    Combination(3, 4, "used twice", "bf16", "none"),
    Combination(3, 1, "used once", "bf16", "lora"),
    Combination(3, 4, "recomputed", "fp32", "none"),
]


@dataclass(frozen=True)
class Finding:
    """What one combination came to."""

    combination: Combination
    grad_rel_err: float  # |found - expected| / |expected|, over all parameters
    grad_norm: float  # as the engine reports it
    expected_norm: float
    ranks_agree: bool  # on every bit of every parameter, after the step

    @property
    def problem(self) -> str:
        """Empty where the gradient is right."""
        tolerance = TOLERANCE[self.combination.precision]
        if not self.grad_rel_err < tolerance:
            return (
                f"the gradient is off by {self.grad_rel_err:.2g} of its size "
                f"(norm {self.grad_norm:.4g} for {self.expected_norm:.4g})"
            )
        if not abs(self.grad_norm - self.expected_norm) < tolerance * self.expected_norm:
            return f"the norm is said to be {self.grad_norm:.4g} of a gradient of {self.expected_norm:.4g}"
        return "" if self.ranks_agree else "the ranks have other parameters after the same step"

    def __str__(self) -> str:
        return f"{self.combination}: {self.problem or f'right to {self.grad_rel_err:.1e}'}"


def config_of(combination: Combination, folder: Path, *overrides: str) -> Any:
    """A run of the combination, of one step without clipping."""
    from tunesmith.train.config.compose import compose_config

    engine = f"engine={f'zero{combination.stage}' if combination.stage else 'ddp'}"
    return compose_config(
        [
            *("model=hub", f"model.name_or_path='{folder}'", "data.train=none.jsonl", "track=none", engine),
            f"engine.precision={combination.precision}",
            f"memory.recompute={int(combination.reuse == 'recomputed')}",
            *(
                "model.attention=eager",
                f"adapter={combination.adapter}",
                "schedule.epochs=null",
                "schedule.max_steps=1",
            ),
            f"batch.global_batch_size={SEQUENCES}",
            f"batch.micro_batch_size={SEQUENCES // WORLD_SIZE // combination.accumulation}",
            *(f"batch.sequence_length={TOKENS}", "optimizer.learning_rate=1e-2", "optimizer.max_grad_norm=null"),
            *overrides,
        ]
    ).config


def write_models(folder: Path) -> None:
    """A tiny Llama whose head is its embedding, and one whose is not."""
    from tunesmith.train.model.load import load_base

    sizes = {"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": TOKENS}
    for name, tied in (("once", False), ("twice", True)):
        own = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "tie_word_embeddings": tied}
        (folder / name).mkdir()
        text = json.dumps(own | sizes | {"initializer_range": 0.2})
        (folder / name / "config.json").write_text(text, encoding="utf-8")
        config = config_of(Combination(0), folder / name, "model.random_weights=true")
        load_base(config).save_pretrained(folder / name)


def make_model(combination: Combination, config: Any, world: Any) -> Any:
    """The model as a run loads it, before its engine."""
    import torch

    from tunesmith.train.model.adapter import transformer_blocks
    from tunesmith.train.model.load import load_model
    from tunesmith.train.zero.sharding import full_shape, gathered

    model = load_model(config, world)
    if combination.reuse != "used once":
        blocks = transformer_blocks(model)
        blocks[1] = blocks[0]
    lots = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # starts at 0, where lora_A has no gradient
            numbers = torch.randn(full_shape(parameter), generator=lots) / 10
            with torch.no_grad(), gathered([parameter], write=True):
                if parameter.numel():
                    parameter.copy_(numbers)
    return model


def sequences() -> tuple[Any, Any]:
    """Token ids and weights of the global batch, [SEQUENCES, TOKENS]; the later a sequence, the more it weighs."""
    import torch

    lots = torch.Generator().manual_seed(2)
    ids = torch.randint(VOCABULARY, (SEQUENCES, TOKENS), generator=lots)
    weights = torch.rand((SEQUENCES, TOKENS), generator=lots) * torch.arange(1, SEQUENCES + 1)[:, None]
    weights[:, -1] = 0  # nothing follows it
    return ids, weights


def batch_of(rows: slice) -> Any:
    """Some sequences of the global batch, as data/store.py makes a batch."""
    import torch

    from tunesmith.kernels.attention.segments import Segments
    from tunesmith.train.data.store import IGNORE_INDEX, Batch

    ids, weights = (part[rows] for part in sequences())
    labels = torch.where(weights == 0, IGNORE_INDEX, ids.roll(-1, 1))
    target_rows = weights.flatten().nonzero().flatten()
    return Batch(
        inputs={"input_ids": ids, "position_ids": torch.arange(TOKENS).expand_as(ids)},
        labels=labels,
        columns={"weights": weights},
        target_rows=target_rows,
        lengths=torch.full((len(ids),), TOKENS),
        segments=Segments.of_rows([[TOKENS]] * len(ids)),
        num_examples=len(ids),
        num_target_tokens=len(target_rows),
        target_weight=float(weights.double().sum()),
        num_tokens=ids.numel(),
    )


def expected_gradients(combination: Combination, folder: Path, weights: dict[str, Any]) -> dict[str, Any]:
    """By name, in float64, in this process alone: whole logits of the global batch, and torch's own backward."""
    import torch

    from tunesmith.train.ranks.distributed import World

    plain = Combination(0, 1, "used once", "fp32", combination.adapter)
    alone = make_model(combination, config_of(plain, folder), World()).double()
    own = dict(alone.named_parameters())
    with torch.no_grad():
        for name, value in weights.items():
            own[name].copy_(value)
    ids, of_tokens = sequences()
    logprobs = alone(input_ids=ids, use_cache=False).logits.log_softmax(-1)
    nll = -logprobs[:, :-1].gather(-1, ids[:, 1:, None]).squeeze(-1)
    loss = (of_tokens[:, :-1].double() * nll).sum() / of_tokens.double().sum()
    loss.backward()
    return {name: parameter.grad for name, parameter in own.items() if parameter.requires_grad}


def applied_gradients(engine: Any) -> dict[str, Any]:
    """What the first update of an engine was made with, by trained parameter: flat, float64. Every rank calls it."""
    import torch

    from tunesmith.train.optimizer import first_gradient
    from tunesmith.train.ranks.distributed import sum_over_ranks
    from tunesmith.train.zero.sharding import full_shape
    from tunesmith.train.zero.universal import optimizer_tensors

    deep, parameters = engine._engine, dict(engine.module.named_parameters())
    trained = {name: parameter for name, parameter in parameters.items() if parameter.requires_grad}
    found = {name: torch.zeros(full_shape(own), dtype=torch.float64).flatten() for name, own in trained.items()}
    held = dict.fromkeys(found, 0)  # numbers of each on this rank: without ZeRO every rank holds all
    for tensor in optimizer_tensors(deep.optimizer, {id(own): name for name, own in parameters.items()}):
        for part in tensor.fragments:
            numbers = first_gradient(deep.basic_optimizer, tensor.weights).flatten()
            found[part.name][part.start : part.start + part.numel] = numbers[part.at : part.at + part.numel]
            held[part.name] = part.numel
    copies = sum_over_ranks(torch.tensor(list(held.values()), dtype=torch.float64))
    return {
        name: sum_over_ranks(gradient) * gradient.numel() / numbers
        for (name, gradient), numbers in zip(found.items(), copies, strict=True)
    }


def check(combination: Combination, folder: Path, world: Any) -> Finding:
    """One step of the engine. folder holds write_models(). Every rank calls it."""
    import torch

    from tunesmith.train.config.config import Kernels
    from tunesmith.train.engine import Engine
    from tunesmith.train.ranks.distributed import gather_texts

    cpu = torch.device("cpu")
    folder = folder / ("once" if combination.reuse == "used once" else "twice")
    config = config_of(combination, folder)
    engine = Engine(make_model(combination, config, world), config, world, cpu, Kernels.off, lambda _: None)
    engine.train()
    names = {name for name, _ in engine.module.named_parameters()}
    before = {name: parameter.detach().double() for name, parameter in engine.whole_parameters(names)}
    expected = expected_gradients(combination, folder, before)
    size = config.batch.micro_batch_size
    first = world.rank * SEQUENCES // world.world_size
    whole_batch = batch_of(slice(0, SEQUENCES))
    scorer = engine.scorer.over(torch.tensor(whole_batch.target_weight), torch.tensor(float(whole_batch.num_tokens)))
    for micro_batch in range(combination.accumulation):
        start = first + micro_batch * size
        engine.backward(scorer.nll(batch_of(slice(start, start + size))).loss)
    update = engine.step()
    found = applied_gradients(engine)
    total, whole = hashlib.sha256(), engine.whole_parameters(names)
    for _, parameter in whole:
        total.update(parameter.detach().float().numpy().tobytes())
    digests = gather_texts(total.hexdigest(), cpu)
    engine.close()

    def size_of(tensors: Any) -> float:
        return float(torch.stack([tensor.norm() for tensor in tensors]).norm())

    expected_norm = size_of(expected.values())
    error = size_of(found[name].view_as(gradient) - gradient for name, gradient in expected.items())
    return Finding(combination, error / expected_norm, update.grad_norm, expected_norm, len(set(digests)) == 1)


def be_rank(rank: int, combinations: Sequence[Combination], folder: Path) -> None:
    """One of the two processes; rank 0 writes down and says what became of each combination."""
    import torch.distributed as dist

    from tunesmith.train.ranks.distributed import World

    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(WORLD_SIZE))
    store = dist.FileStore(str(folder / "store"), WORLD_SIZE)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD_SIZE, timeout=timedelta(minutes=2))
    world = World(rank, WORLD_SIZE, rank, WORLD_SIZE)
    for combination in combinations:
        finding = check(combination, folder, world)
        if rank == 0:
            with (folder / FINDINGS).open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(finding)) + "\n")
            sys.stdout.write(f"{finding}\n")
            sys.stdout.flush()


def check_all(combinations: Sequence[Combination]) -> list[Finding]:
    """What two processes find, which are forked once all is imported. Raises RuntimeError when one of them failed."""
    import tunesmith.train.run.setup  # noqa: F401 - all that a rank imports

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_models(folder)
        children = [_fork(rank, combinations, folder) for rank in range(WORLD_SIZE)]
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        if any(codes):
            said = [path.read_text(encoding="utf-8") for path in sorted(folder.glob(f"{ERROR}*"))]
            raise RuntimeError(" ".join((said or [f"its ranks ended with {codes}"])[0].split()))
        rows = [json.loads(line) for line in (folder / FINDINGS).read_text(encoding="utf-8").splitlines()]
    return [Finding(**row | {"combination": Combination(**row["combination"])}) for row in rows]


def _fork(rank: int, combinations: Sequence[Combination], folder: Path) -> int:
    if child := os.fork():
        return child
    try:
        be_rank(rank, combinations, folder)
    except Exception as error:
        said = str(error) if isinstance(error, TunesmithError) else f"{type(error).__name__}: {error}"
        (folder / f"{ERROR}{rank}").write_text(said, encoding="utf-8")
        os._exit(1)
    os._exit(0)


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description="Compares the engine's gradients with one process in float64.")
    parser.add_argument("--quick", action="store_true", help="ten combinations that meet every setting, in 10 seconds")
    combinations = QUICK if parser.parse_args(arguments).quick else ALL
    for name in [name for name in os.environ if name.startswith(LAUNCHERS)]:
        del os.environ[name]
    os.environ.update(ENVIRONMENT)
    try:
        findings = check_all(combinations)
    except RuntimeError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    for precision in sorted({finding.combination.precision for finding in findings}):
        sys.stdout.write(f"{precision}: max_grad_rel_err={_worst(findings, precision):.1e}\n")
    wrong = [finding for finding in findings if finding.problem]
    sys.stdout.writelines(f"{finding}\n" for finding in wrong)
    sys.stdout.write(f"engine: max_grad_rel_err={_worst(findings):.1e} combinations={len(findings)}\n")
    return WRONG if wrong else 0


def _worst(findings: Sequence[Finding], precision: str = "") -> float:
    return max(finding.grad_rel_err for finding in findings if precision in finding.combination.precision)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
