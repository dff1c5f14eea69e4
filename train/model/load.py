"""A name in, a module out: weights in the target dtype, split over the ranks as they are read, adapters in place."""

import contextlib
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from pickle import UnpicklingError  # noqa: TID251 - the type of an error; nothing is read
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from tunesmith.train.config.config import Attention, Config, ModelConfig, Precision
from tunesmith.train.errors import ModelError
from tunesmith.train.model.adapter import add_adapter
from tunesmith.train.model.attention import use_segments
from tunesmith.train.model.finite import check_finite
from tunesmith.train.model.foreign_code import check_adapter, check_index, check_kernels
from tunesmith.train.model.recompute import recompute_blocks
from tunesmith.train.model.vocabulary import add_rows
from tunesmith.train.model.weights import load_weights, weight_files
from tunesmith.train.paths import resolve_path
from tunesmith.train.ranks.distributed import World, choose_device
from tunesmith.train.zero.sharding import known_to_peft, sharded_init

CPU = torch.device("cpu")
DTYPES = {Precision.bf16: torch.bfloat16, Precision.fp16: torch.float16, Precision.fp32: torch.float32}


def load_model(config: Config, world: World, *, num_ids: int = 0) -> nn.Module:
    """The model to train, on the CPU (or split over the ranks under ZeRO 3), with its adapter. Every rank calls it.

    num_ids: of the tokenizer, for each of which model.resize_embeddings makes a row.
    Raises ModelError when the name leads nowhere, the weights do not fit, or code would have to run.
    """
    settings = config.model
    hf_config = check_model(config)
    if config.engine.stage == 3 and not settings.random_weights:
        model = _load_sharded(config, world, hf_config)
    else:
        model = load_base(config)
    check_finite(model, settings.name_or_path, world, choose_device(config.cluster.device, world))
    if settings.resize_embeddings:
        add_rows(model, num_ids, config, world)
    if settings.attention is Attention.segments:
        use_segments(model)  # settled before: packing.py
    recompute_blocks(model, config.memory.recompute or 0.0)  # null: nobody settled it, as on a CPU
    model.config.use_cache = False
    torch.manual_seed(config.seed)  # adapters start the same on every rank
    with quiet_transformers(), known_to_peft(config, world):
        return add_adapter(model, config.adapter)


def check_model(config: Config) -> Any:
    """transformers' config of the model; reads no weights. Raises ModelError when it cannot be trained so."""
    hf_config = load_hf_config(config.model)
    check_index(Path(resolve_path(config.model.name_or_path)))
    if config.batch.sequence_length > (limit := num_positions(hf_config) or 2**62):
        raise ModelError(
            f"sequence_length={config.batch.sequence_length} is beyond the {limit} positions of "
            f"{config.model.name_or_path}.",
            at="batch.sequence_length",
            do=f"set batch.sequence_length to {limit} or less.",
        )
    return hf_config


def num_positions(hf_config: Any) -> int | None:
    """Tokens that a sequence may have, of a model that sees by its text part; None where there is no end."""
    return getattr(hf_config.get_text_config(decoder=True), "max_position_embeddings", None) or None


def load_base(config: Config) -> PreTrainedModel:
    """The whole model before training, without an adapter, on the CPU. Raises ModelError."""
    settings = config.model
    hf_config = load_hf_config(settings)
    dtype = DTYPES[config.engine.precision]
    with quiet_transformers():
        if not settings.random_weights:
            return _load_whole(settings, hf_config, dtype)
        torch.manual_seed(config.seed)
        return empty_model(settings, hf_config, dtype)


def open_model(folder: Path, config: Config) -> Any:
    """The saved model ready to answer, on the CPU: from its files alone, or the base model with the adapter on it."""
    if (folder / "adapter_config.json").is_file():
        check_adapter(folder)
        base = load_base(config)
        check_finite(base, config.model.name_or_path, World(), CPU)
        # PEFT imports DeepSpeed, which announces the accelerator it finds unless it is told.
        os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
        from peft import PeftModel

        with quiet_transformers():
            return PeftModel.from_pretrained(base, str(folder), autocast_adapter_dtype=False).eval()
    trusted = bool(config.model.trust_remote_code)
    try:
        check_index(folder)
        if not trusted:
            check_kernels(str(folder))
        with quiet_transformers():
            options = {"trust_remote_code": trusted, "use_safetensors": True}
            model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", **options).eval()
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise not_loadable(str(folder), error) from None
    check_finite(model, str(folder), World(), CPU)
    return model


def load_hf_config(settings: ModelConfig) -> Any:
    """transformers' config of the model. Raises ModelError."""
    name = resolve_path(settings.name_or_path)
    try:
        with quiet_transformers():
            if not settings.trust_remote_code:
                check_kernels(name, settings.revision)
            found = AutoConfig.from_pretrained(
                name, revision=settings.revision, trust_remote_code=bool(settings.trust_remote_code)
            )
            found.return_dict = True  # outputs are taken by name
            return found
    except (OSError, ValueError, RecursionError) as error:
        raise not_loadable(settings.name_or_path, error) from None


def not_loadable(name: str, error: Exception) -> ModelError:
    """transformers' many-line error in one, with the remedy that fits."""
    text = str(error)
    if isinstance(error, ImportError):
        return ModelError(
            f"{name} needs a library that is not there: {' '.join(text.split())[:200]}",
            at="model.attention" if "ttention" in text else "model.name_or_path",
            do="install it, or choose another model or model.attention=auto.",
        )
    if "trust_remote_code" in text:
        return ModelError(
            f"{name} brings its own code, which Tunesmith does not run unasked.",
            at="model.name_or_path",
            do="read that code, then set model.trust_remote_code=true.",
        )
    reason, do = " ".join(text.split()), "check the spelling, the network and HF_TOKEN."
    if name.startswith((".", "/", "~")) or Path(name).exists():
        do = "give a folder with a config.json and weights in safetensors."
        reason = reason if Path(name).is_dir() else "there is no such folder."
    if isinstance(error, UnpicklingError):
        reason = "its weights are a pickle with more than tensors in it, which could run code."
    reason = reason if len(reason) <= 200 else f"{reason[:197]}..."
    return ModelError(f"no model can be loaded from {name!r}: {reason}", at="model.name_or_path", do=do)


def _options(settings: ModelConfig) -> dict[str, Any]:
    options: dict[str, Any] = {"trust_remote_code": bool(settings.trust_remote_code)}
    if settings.attention not in (Attention.auto, Attention.segments):
        options["attn_implementation"] = str(settings.attention)
    return options


def empty_model(settings: ModelConfig, hf_config: Any, dtype: torch.dtype) -> PreTrainedModel:
    """The model without its weights, but with its generation config, which from_config() does not read."""
    try:
        model = AutoModelForCausalLM.from_config(hf_config, dtype=dtype, **_options(settings))
        model.generation_config = _generation_config(settings)
        return model
    except (ValueError, ImportError) as error:
        raise not_loadable(settings.name_or_path, error) from None


def _generation_config(settings: ModelConfig) -> GenerationConfig:
    """Of its own file, else of what an old config.json says, as transformers' from_pretrained() finds it."""
    name, revision = resolve_path(settings.name_or_path), settings.revision or "main"
    try:
        return GenerationConfig.from_pretrained(name, revision=revision)
    except OSError:
        old = {"config_file_name": "config.json", "_from_model_config": True}
        return GenerationConfig.from_pretrained(name, revision=revision, **old)


def _load_whole(settings: ModelConfig, hf_config: Any, dtype: torch.dtype) -> PreTrainedModel:
    options = _options(settings)
    dequantize = _quantization(hf_config) == "mxfp4"  # gpt-oss: read into the training dtype
    if dequantize:
        options["quantization_config"] = transformers.Mxfp4Config(dequantize=True)
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            resolve_path(settings.name_or_path),
            config=hf_config,
            revision=settings.revision,
            dtype=dtype,
            use_safetensors=True,  # a .bin is a pickle
            output_loading_info=True,
            **options,
        )
    except (OSError, ValueError, ImportError, SafetensorError, UnpicklingError) as error:
        raise not_loadable(settings.name_or_path, error) from None
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise ModelError(
            f"{len(missing)} weights are not in the files of {settings.name_or_path}, such as {missing[0]}.",
            at="model.name_or_path",
            do="use a complete checkpoint; Tunesmith does not fill weights with random numbers unasked.",
        )
    if dequantize:
        # Nothing quantizes it again: reversed, the quantizer's converters would give dense weights its names.
        model._weight_conversions = [it for it in model._weight_conversions if not _is_quantizers(it)]
    return model


def _is_quantizers(conversion: Any) -> bool:
    return any(hasattr(operation, "hf_quantizer") for operation in getattr(conversion, "operations", ()))


def _load_sharded(config: Config, world: World, hf_config: Any) -> PreTrainedModel:
    """Under ZeRO 3: an empty split model, then one tensor at a time read by rank 0 and split over the ranks."""
    settings = config.model
    if _quantization(hf_config):
        raise ModelError(
            f"{settings.name_or_path} is stored as {_quantization(hf_config)}, which cannot be split while it is read.",
            at="model.name_or_path",
            do="use engine=zero2, or a checkpoint in bf16.",
        )
    files = weight_files(settings)
    dtype = DTYPES[config.engine.precision]
    with quiet_transformers(), no_init_weights():
        # zero.Init wraps the __init__ of every class, and at its end puts back what a class had when it was defined: of
        # one first imported inside, what a decorator has made of its __init__ since is lost, as of gpt-oss's experts.
        with torch.device("meta"):
            empty_model(settings, hf_config, dtype)
        with sharded_init(config, world):
            model = empty_model(settings, hf_config, dtype)
    model.tie_weights()
    load_weights(model, files, settings.name_or_path)
    return model


def _quantization(hf_config: Any) -> str | None:
    stored = getattr(hf_config, "quantization_config", None)
    return stored.get("quant_method") if isinstance(stored, dict) else None


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Hides transformers' own progress bars and notes: one rank in eight printing a bar is noise."""
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            # 2026-11: PEFT 0.21.2 asks transformers 5.23 by a name it has deprecated; nothing a user can mend.
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
            # An adapter on a tied head: merge.py unties the two, and compares logits afterwards.
            warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True` and a tied layer")
            yield
    finally:
        transformers.logging.set_verbosity(level)
        transformers.logging.enable_progress_bar()
