"""What stands in a model's folder beside the weights: the one writer of it, for a run's model and for a merged one."""

import copy
import tempfile
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from tunesmith.train.config.config import Config
from tunesmith.train.data.render import stop_token_ids
from tunesmith.train.errors import ModelError
from tunesmith.train.files.disk_errors import reason_of, remedy
from tunesmith.train.model.load import quiet_transformers
from tunesmith.train.paths import resolve_path
from tunesmith.train.ranks.distributed import World, first_problem


def write_settings(folder: Path, model: Any, tokenizer: Any, config: Config) -> None:
    """Tokenizer with its chat template, generation config, and the model's config or the adapter's."""
    from peft import PeftModel

    with quiet_transformers():
        tokenizer.save_pretrained(folder)
        generation = finished_generation_config(model, tokenizer)
        # Not save_pretrained(), which refuses sampling settings without do_sample, as many published models have them.
        generation.to_json_file(folder / "generation_config.json", use_diff=True, keys_to_pop=["compile_config"])
        if isinstance(model, PeftModel):
            lora = copy.deepcopy(model.peft_config["default"])
            lora.base_model_name_or_path = resolve_path(config.model.name_or_path)
            lora.inference_mode = True
            lora.save_pretrained(str(folder))
            return
        settings = copy.deepcopy(model.config)
        settings.use_cache = True
        settings.architectures = [type(model).__name__]
        settings.save_pretrained(folder)


def finished_generation_config(model: Any, tokenizer: Any) -> Any:
    """The base model's generation config, value for value, but for padding and what ends an answer.

    That is every end-of-sequence id of the base model, and the tokens that end our turns.
    """
    generation = copy.deepcopy(model.generation_config)
    configs = (model.config, model.config.get_text_config())  # of a model that sees, the second alone may have one
    named = [generation.eos_token_id, *(getattr(config, "eos_token_id", None) for config in configs)]
    ids = [*chain.from_iterable(map(_as_list, named)), *stop_token_ids(tokenizer)]
    generation.eos_token_id = list(dict.fromkeys(ids))
    generation.pad_token_id = tokenizer.pad_token_id
    return generation


def _as_list(ids: int | list[int] | None) -> list[int]:
    return [] if ids is None else [ids] if isinstance(ids, int) else ids


def try_settings(model: Any, tokenizer: Any, config: Config, world: World, device: torch.device) -> None:
    """Writes them to a scratch folder, as the end of the run will: what cannot be written is found before the training.

    Every rank calls it. Raises ModelError, on all ranks.
    """
    problem = ""
    if world.rank == 0:
        try:
            with tempfile.TemporaryDirectory(prefix="tunesmith-") as scratch:
                write_settings(Path(scratch), model, tokenizer, config)
        except Exception as error:  # transformers, tokenizers and PEFT have errors of their own
            problem = reason_of(error)
    problem = first_problem(problem, device)
    if problem:
        raise ModelError(
            f"the model could not be written after the training, and nothing is trained: {problem}.",
            at="model.name_or_path",
            do=remedy(
                problem,
                "correct the file of the model's folder that holds this (tokenizer_config.json, "
                "config.json or generation_config.json).",
            ),
        )
