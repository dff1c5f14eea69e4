"""The random numbers of one rank: seeded, written down, and restored to the bit."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save

RANK_STRIDE = 65_537  # ranks draw other numbers; a prime, so that seeds that follow each other share no rank's
STEP_STRIDE = 2_654_435_761


def seed_everything(seed: int) -> None:
    """Seeds Python, NumPy and torch on this rank."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def seed_rank(seed: int, rank: int, step: int = 0) -> None:
    """The numbers a rank starts with, or goes on with where a checkpoint of fewer ranks holds none for it."""
    seed_everything((seed * RANK_STRIDE + rank + step * STEP_STRIDE) % 2**63)


def random_state_files(rank: int) -> dict[str, bytes]:
    """This rank's random-number state, as the files of a checkpoint: name -> content."""
    name, keys, position, has_gauss, gauss = np.random.get_state()
    tensors = {
        "torch": torch.get_rng_state(),
        "numpy": torch.from_numpy(np.asarray(keys, dtype=np.uint32).view(np.int32).copy()),
    }
    if torch.cuda.is_initialized():
        tensors["cuda"] = torch.cuda.get_rng_state()
    numpy_rest = {"name": str(name), "position": int(position), "has_gauss": int(has_gauss), "gauss": float(gauss)}
    rest = {"python": random.getstate(), "numpy": numpy_rest}
    return {f"rank-{rank:05d}.safetensors": save(tensors), f"rank-{rank:05d}.json": json.dumps(rest).encode()}


def load_random_state(folder: Path, rank: int) -> bool:
    """Goes on with the numbers of a checkpoint; False where it has none for this rank."""
    file = folder / f"rank-{rank:05d}.safetensors"
    if not file.is_file():
        return False
    tensors = load_file(file)
    rest: dict[str, Any] = json.loads(file.with_suffix(".json").read_text(encoding="utf-8"))
    version, internal, gauss = rest["python"]
    random.setstate((version, tuple(internal), gauss))
    numpy_rest = rest["numpy"]
    keys = tensors["numpy"].numpy().view(np.uint32)
    np.random.set_state(
        (numpy_rest["name"], keys, numpy_rest["position"], numpy_rest["has_gauss"], numpy_rest["gauss"])
    )
    torch.set_rng_state(tensors["torch"])
    if "cuda" in tensors and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(tensors["cuda"])
    return True
