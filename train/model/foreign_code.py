"""What a model's folder could have run besides its Python files, for which transformers asks by itself.

A kernel named in config.json is downloaded from the hub and run as native code; an adapter's settings can name a module
that PEFT imports; an adapter that is no safetensors file is a pickle.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from tunesmith.train.errors import ModelError

# Settings of a model that transformers takes a kernel of the hub for, with and without the underscore.
KERNEL_KEYS = ("attn_implementation", "experts_implementation")
# Settings of a LoRA adapter that make PEFT import a module by its name.
IMPORTING_KEYS = ("megatron_config",)
ADAPTER_WEIGHTS = "adapter_model.safetensors"


def check_kernels(name: str, revision: str | None = None) -> None:
    """Raises ModelError when the model's config.json names a kernel; OSError or ValueError when it can't be read."""
    raw, _ = PreTrainedConfig.get_config_dict(name, revision=revision)
    for kernel in _kernels(raw):
        raise ModelError(
            f"the config.json of {name} names the kernel {kernel!r}, code from the hub that Tunesmith does not run "
            "unasked.",
            at="model.name_or_path",
            do="look at that kernel, then set model.trust_remote_code=true; or take the setting out of config.json.",
        )


def _kernels(tree: Any) -> Iterator[str]:
    """Values with a slash, as `owner/name` has, of the settings that choose kernels, at any depth."""
    if isinstance(tree, list):
        for part in tree:
            yield from _kernels(part)
    if not isinstance(tree, dict):
        return
    for key, value in tree.items():
        if any(str(key).strip("_").startswith(known) for known in KERNEL_KEYS):
            named = value.values() if isinstance(value, dict) else [value]
            yield from (str(name) for name in named if "/" in str(name))
        yield from _kernels(value)


def check_index(folder: Path) -> None:
    """Raises ModelError when the list of a model's weight files names one outside its folder, or of another kind."""
    path = folder / "model.safetensors.index.json"
    if not path.is_file():
        return
    try:
        names = set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"{path.name} can't be read: {error}", at=str(path), do="get the file anew.") from None
    for name in sorted(map(str, names)):
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise ModelError(
                f"{path.name} names the file {name!r}, which is no safetensors file of this folder.",
                at=str(path),
                do="get the model anew from where you trust it.",
            )


def check_adapter(folder: Path) -> None:
    """Raises ModelError unless a saved adapter is LoRA matrices in safetensors, with nothing for PEFT to import."""
    try:
        settings = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        kind = settings.get("peft_type")
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise ModelError(
            f"adapter_config.json can't be read: {error}", at=str(folder), do="take the folder that training wrote."
        ) from None
    problem = None
    if kind != "LORA":
        problem = f"the adapter is a {kind!r}, which Tunesmith does not write."
    elif importing := [key for key in IMPORTING_KEYS if settings.get(key)]:
        problem = f"{importing[0]} in adapter_config.json would import a module by its name."
    elif not (folder / ADAPTER_WEIGHTS).is_file():
        problem = f"{ADAPTER_WEIGHTS} is not there; a pickle such as adapter_model.bin is never read."
    if problem:
        raise ModelError(problem, at=str(folder), do="take the folder that training wrote.")
