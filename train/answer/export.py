"""The model a run leaves behind: written from the live weights, then opened again and compared with them.

An adapter goes in PEFT's format, anything else as a full transformers model in safetensors, tokenizer and chat
template beside it. The best weights are written while they are live, with a digest of each tensor; when the run ends
they are put back into the live model, which answers the questions, and the files are opened and compared with both.
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tunesmith.train.answer.model_folder import write_settings
from tunesmith.train.config.config import AdapterKind, Config
from tunesmith.train.errors import TrainingError
from tunesmith.train.files.disk_errors import reason_of, remedy
from tunesmith.train.files.durable import write_json
from tunesmith.train.files.fence import fence
from tunesmith.train.model.conversion import Publishing
from tunesmith.train.model.load import open_model
from tunesmith.train.model.weights import fill, load_weights
from tunesmith.train.ranks import distributed

if TYPE_CHECKING:
    from tunesmith.train.engine import Engine

SHARD_BYTES = 5 * 2**30  # as transformers splits
PROBE_TOKENS = 32  # positions whose logits are compared after the model is read back
# Of the largest logit: the live model may run on a GPU, or with split weights, and the one read back runs on the CPU.
LOGIT_TOLERANCE = {"fp32": 1e-4, "bf16": 5e-2, "fp16": 1e-2}


def write(engine: "Engine", tokenizer: Any, config: Config, folder: Path) -> None:
    """Writes the live weights to a folder and their digests to <folder>.digests.json. Every rank calls it.

    Raises TrainingError, on all ranks, when rank 0 cannot write them; nothing of them is left then.
    """
    names = saved_names(engine.module, config)
    publishing = None if _is_adapter(config) else Publishing(engine.module, names)
    draft = Draft(folder, "adapter_model" if _is_adapter(config) else "model") if engine.world.rank == 0 else None
    for name, tensor in live_tensors(engine, names):  # to the end in any case: under ZeRO 3 all ranks give their part
        if draft:
            draft.add(names[name], tensor, publishing)
    if draft:
        draft.finish(lambda: write_settings(folder, engine.module, tokenizer, config))
    problem = distributed.first_problem(draft.problem if draft else "", engine.device)
    if problem:
        raise TrainingError(
            f"the model could not be written. {problem}.",
            at=str(folder),
            do=f"{remedy(problem, 'report this')}; the checkpoints of the run are not affected.",
        )


class Draft:
    """A model that rank 0 writes while the others give their parts of it. What goes wrong stands in `problem`."""

    def __init__(self, folder: Path, stem: str) -> None:
        self.problem = ""
        self._folder = folder
        self._writer = ShardWriter(folder, stem)
        self._digests: dict[str, str] = {}
        self._careful(self._begin)

    def _begin(self) -> None:
        fence.check()
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir(parents=True)

    def add(self, name: str, tensor: torch.Tensor, publishing: Publishing | None = None) -> None:
        """Of a whole model, publishing says what of it is published, and when."""
        self._careful(lambda: self._add(name, tensor.detach().to("cpu"), publishing))

    def _add(self, name: str, whole: torch.Tensor, publishing: Publishing | None) -> None:
        for published, part in (publishing.take(name, whole) if publishing else {name: whole}).items():
            self._digests[published] = digest(part)
            self._writer.add(published, part.contiguous())

    def finish(self, write_rest: Callable[[], None]) -> None:
        self._careful(self._writer.close)
        self._careful(write_rest)
        self._careful(lambda: write_json(digest_file(self._folder), self._digests))

    def _careful(self, action: Callable[[], None]) -> None:
        if self.problem:
            return
        try:
            action()
        except Exception as error:  # safetensors and tokenizers have errors of their own for a full disk
            self.problem = reason_of(error)
            remove_written(self._folder)


def digest_file(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.digests.json")


def digest(tensor: torch.Tensor) -> str:
    """sha256 of a CPU tensor's bytes."""
    return hashlib.sha256(tensor.contiguous().view(-1).view(torch.uint8).numpy().data).hexdigest()


def saved_names(model: Any, config: Config) -> dict[str, str]:
    """What is saved of the live model, tied weights once: each one's name there -> its name in an adapter's files, and
    of a whole model the same again, which Publishing goes on from.
    """
    if not _is_adapter(config):
        persistent = set(model.state_dict())
        buffers = [name for name, _ in model.named_buffers() if name in persistent]
        return {name: name for name in [name for name, _ in model.named_parameters()] + buffers}
    from peft import get_peft_model_state_dict

    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    numbered = {name: torch.tensor(number) for number, name in enumerate(trained)}
    renamed = get_peft_model_state_dict(model, state_dict=numbered, save_embedding_layers=False)
    return {trained[int(number)]: name for name, number in renamed.items()}


def live_tensors(engine: "Engine", names: dict[str, str]) -> Iterator[tuple[str, torch.Tensor]]:
    """Each named parameter or buffer, whole while it is held."""
    for name, parameter in engine.whole_parameters(names):
        yield name, parameter
    for name, buffer in engine.module.named_buffers():
        if name in names:
            yield name, buffer


def _is_adapter(config: Config) -> bool:
    return config.adapter.kind is AdapterKind.lora


class ShardWriter:
    """Writes tensors into safetensors files of SHARD_BYTES, as they come, with the index transformers reads."""

    def __init__(self, folder: Path, stem: str) -> None:
        self._folder = folder
        self._stem = stem
        self._held: dict[str, torch.Tensor] = {}
        self._bytes = 0
        self._total = 0
        self._shards: list[list[str]] = []

    def add(self, name: str, tensor: torch.Tensor) -> None:
        size = tensor.numel() * tensor.element_size()
        if self._held and self._bytes + size > SHARD_BYTES:
            self._flush()
        self._held[name] = tensor
        self._bytes += size
        self._total += size

    def _flush(self) -> None:
        save_file(self._held, self._folder / f".shard-{len(self._shards)}", metadata={"format": "pt"})
        self._shards.append(list(self._held))
        self._held, self._bytes = {}, 0

    def close(self) -> None:
        self._flush()
        count = len(self._shards)
        names = [f"{self._stem}-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
        if count == 1:
            names = [f"{self._stem}.safetensors"]
        for number, name in enumerate(names):
            os.replace(self._folder / f".shard-{number}", self._folder / name)
        if count > 1:
            weight_map = {key: name for name, keys in zip(names, self._shards, strict=True) for key in keys}
            index = {"metadata": {"total_size": self._total}, "weight_map": weight_map}
            write_json(self._folder / f"{self._stem}.safetensors.index.json", index)


def restore(engine: "Engine", config: Config, folder: Path) -> None:
    """Puts written weights back into the live model, for answering, not for training on. Every rank calls it."""
    files = sorted(folder.glob("*.safetensors"))
    if not _is_adapter(config):
        load_weights(engine.module, files, str(folder))
        return
    names = saved_names(engine.module, config)
    places = {name: path for path in files for name in _tensor_names(path)}
    for name, parameter in engine.module.named_parameters():
        if name in names:
            fill(parameter, places[names[name]], names[name])


def _tensor_names(path: Path) -> list[str]:
    with safe_open(path, framework="pt") as file:
        return list(file.keys())


def probe_ids(model: Any) -> torch.Tensor:
    """A fixed line of tokens, [1, PROBE_TOKENS] int64, drawn from the model's vocabulary."""
    vocabulary = model.get_input_embeddings().num_embeddings
    return torch.randint(0, vocabulary, (1, PROBE_TOKENS), generator=torch.Generator().manual_seed(0))


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference over the largest expected value."""
    difference = (found.detach() - expected.detach()).abs().max()
    return float(difference / expected.detach().abs().max().clamp_min(1e-6))


@torch.no_grad()
def probe(engine: "Engine") -> tuple[torch.Tensor, torch.Tensor]:
    """A fixed line of tokens and the live model's logits on it: [1, P] int64, [P, V] float32. Every rank calls it."""
    ids = probe_ids(engine.module)
    engine.eval()
    logits = engine.module(input_ids=ids.to(engine.device), use_cache=False).logits
    return ids, logits[0].float().cpu()


def verify(folder: Path, config: Config, probe_ids: torch.Tensor, live_logits_TV: torch.Tensor) -> str:
    """Opens the written model as a user would and compares it with the live one; rank 0 only, on the CPU.

    Returns what was compared, in words. Raises TrainingError when a weight or a logit differs.
    """
    digests = json.loads(digest_file(folder).read_text(encoding="utf-8"))
    compare_weights(folder, digests)
    needed = 1.3 * sum(p.stat().st_size for p in folder.glob("*.safetensors"))
    if psutil.virtual_memory().available < needed:
        return f"{len(digests)} weights equal; logits not compared, which would take {needed / 2**30:.0f} GiB of memory"
    with torch.no_grad():
        logits_TV = open_model(folder, config)(input_ids=probe_ids).logits[0].float()
    error = relative_error(logits_TV, live_logits_TV)
    tolerance = LOGIT_TOLERANCE[str(config.engine.precision)]
    if not error <= tolerance:
        raise TrainingError(
            f"the saved model gives other logits than the live one: relative error {error:.1e}, above {tolerance:.0e}.",
            at=str(folder),
            do="report this; the checkpoints of the run are not affected.",
        )
    return f"{len(digests)} weights equal, logits within {error:.1e}"


def compare_weights(folder: Path, digests: dict[str, str]) -> None:
    """Raises TrainingError unless the files hold exactly the tensors whose digests were taken from the live model."""
    found: dict[str, str] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            found |= {name: digest(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118
    wrong = sorted(name for name in found.keys() | digests.keys() if found.get(name) != digests.get(name))
    if wrong or not digests:
        raise TrainingError(f"{len(wrong)} saved weights differ from the live ones: {wrong[:3]}.", at=str(folder))


def remove_others(folder: Path) -> None:
    """Leaves only this written model in its parent folder; rank 0 only."""
    fence.check()
    for other in folder.parent.iterdir():
        if other.is_dir() and other != folder:
            remove_written(other)


def remove_written(folder: Path) -> None:
    """Removes a written model with its digests, as far as it can be: discard_drafts() comes for the rest."""
    shutil.rmtree(folder, ignore_errors=True)
    with contextlib.suppress(OSError):
        digest_file(folder).unlink(missing_ok=True)


def publish(draft: Path, target: Path) -> None:
    """Puts a written model in its place in one move, by links where the disk has them; rank 0 only. The draft stays."""
    fence.check()
    staged = target.with_name(f".{target.name}.staged")
    shutil.rmtree(staged, ignore_errors=True)
    shutil.copytree(draft, staged, copy_function=_link_or_copy)
    if target.exists():
        shutil.rmtree(target)
    os.replace(staged, target)


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def discard_drafts(draft: Path) -> None:
    """Removes the folder of drafts; rank 0 only."""
    shutil.rmtree(draft.parent, ignore_errors=True)
