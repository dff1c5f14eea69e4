"""An adapter merged into its base model."""

import os
import shutil
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tunesmith.train import run_folder
from tunesmith.train.compose import load_resolved
from tunesmith.train.errors import ConfigError, TrainingError
from tunesmith.train.export import LOGIT_TOLERANCE, probe_ids, relative_error
from tunesmith.train.model import open_model, quiet_transformers


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
    merged = adapted.float().merge_and_unload()
    _untie_where_they_differ(merged)
    merged.to(dtype)
    merged.config.use_cache = True
    staged = out.with_name(f".{out.name}.staged")
    shutil.rmtree(staged, ignore_errors=True)
    with quiet_transformers():
        merged.save_pretrained(staged)
        AutoTokenizer.from_pretrained(folder).save_pretrained(staged)
        reopened = AutoModelForCausalLM.from_pretrained(staged, dtype="auto").eval()
    error = relative_error(reopened(input_ids=ids).logits[0].float(), expected)
    if not error <= LOGIT_TOLERANCE[str(config.engine.precision)]:
        shutil.rmtree(staged)
        raise TrainingError(f"the merged model gives other logits: relative error {error:.1e}.", at=str(run_dir))
    os.replace(staged, out)
    return f"merged, opened again, logits within {error:.1e} of the adapter's"


def _untie_where_they_differ(model: torch.nn.Module) -> None:
    """Tells the config that embedding and head are two, where merging has made them so."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    if model.config.tie_word_embeddings and head.weight is not embedding.weight:  # type: ignore[union-attr]
        model.config.tie_word_embeddings = False  # type: ignore[union-attr]
