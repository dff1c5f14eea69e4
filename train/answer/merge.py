"""An adapter merged into its base model."""

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tunesmith.train.answer.export import LOGIT_TOLERANCE, probe_ids, relative_error
from tunesmith.train.answer.model_folder import write_settings
from tunesmith.train.config.compose import load_resolved
from tunesmith.train.data.tokenizer import open_tokenizer
from tunesmith.train.errors import ConfigError, TrainingError
from tunesmith.train.files import run_folder
from tunesmith.train.model.load import open_model, quiet_transformers


@torch.no_grad()
def merge(run_dir: Path, out: Path) -> str:
    """Writes the merged model of a run to a folder that does not exist yet; says in words how it was checked.

    The sum is taken in float32 and rounded once to the base's dtype. A tied embedding that the adapter has moved is
    untied. Raises ConfigError when the run has no adapter, TrainingError when the merged model gives other logits.
    """
    folder = run_dir / run_folder.MODEL
    if not (folder / "adapter_config.json").is_file():
        raise ConfigError(f"{folder} is a full model already.", at="run", do="use that folder as it is.")
    config = load_resolved(run_dir / run_folder.CONFIG)
    adapted = open_model(folder, config)
    ids = probe_ids(adapted)
    expected = adapted(input_ids=ids).logits[0].float()
    dtype = next(adapted.parameters()).dtype
    _untie_adapted(adapted)
    merged = adapted.float().merge_and_unload()
    merged.to(dtype)
    staged = out.with_name(f".{out.name}.staged")
    shutil.rmtree(staged, ignore_errors=True)
    with quiet_transformers():
        merged.save_pretrained(staged)
        write_settings(staged, merged, open_tokenizer(folder, config.model), config)
        reopened = open_model(staged, config)
    error = relative_error(reopened(input_ids=ids).logits[0].float(), expected)
    if not error <= LOGIT_TOLERANCE[str(config.engine.precision)]:
        shutil.rmtree(staged)
        raise TrainingError(f"the merged model gives other logits: relative error {error:.1e}.", at=str(run_dir))
    os.replace(staged, out)
    return f"merged, opened again, logits within {error:.1e} of the adapter's"


def _untie_adapted(model: Any) -> None:
    """Makes two of an embedding and a head that share a weight, where the adapter changes one of them."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if model.config.tie_word_embeddings and (hasattr(head, "base_layer") or hasattr(embedding, "base_layer")):
        holder = getattr(head, "base_layer", head)
        holder.weight = nn.Parameter(holder.weight.detach().clone())
        model.config.tie_word_embeddings = False
