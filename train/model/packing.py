"""Whether a model keeps packed records apart: asked of a small twin before anything is loaded, and of the live model.

Each model of transformers builds its own attention mask, and some leave position_ids out of it (gpt-oss in 5.23:
https://github.com/huggingface/transformers/pull/39997); a recurrent layer carries its state over; flash_attention_2
reads position_ids only in forwards of one sequence. Nothing fails then, and every record but the first is learned with
a stranger's text before it. Two short forwards tell.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from tunesmith.kernels.attention.segments import Segments
from tunesmith.train.config.config import Attention, Config, Packing, Precision
from tunesmith.train.errors import ModelError
from tunesmith.train.model.attention import offering, shown, use_segments
from tunesmith.train.model.load import DTYPES, empty_model, quiet_transformers

RECORD_TOKENS = 8
# Relative difference of the second record's logits, packed and alone. Measured on two-layer models of seven families:
# up to 4e-7 in fp32 and 7e-3 in bf16 by rounding; by a leak 0.03 (weights drawn at 0.02) to 1.2 (drawn at 0.2). On the
# twins of 132 families, in fp32: up to 1.2e-6, or 0.1 and more.
TOLERANCE = {Precision.fp32: 1e-3, Precision.bf16: 0.1, Precision.fp16: 0.1}
TWIN_WIDTH, TWIN_HEADS, TWIN_VOCABULARY = 64, 4, 64
TWIN_WINDOW = 5  # tokens; shorter than the records, so that a window that is passed over is seen
MAX_TWIN_PARAMETERS = 1_000_000_000
OURS = (Attention.auto, Attention.segments)
COMPILED = (Attention.flash_attention_2, Attention.flex_attention)  # these have a GPU's form alone


def settle(config: Config, hf_config: Any, device: torch.device, note: Callable[[str], None]) -> None:
    """Writes down in the config what model.attention=auto and batch.packing=auto come to, before weights are loaded.

    Attention becomes segments where the model can do that, and stays auto where it cannot; packing becomes best_fit or
    none, for which note gets a sentence. Raises ModelError where a model cannot do what is asked of it.
    """
    # On the CPU every rank finds the same, and nothing is compiled; the live model is asked on its own device.
    device = device if config.model.attention in COMPILED else torch.device("cpu")
    twin, precision = _twin(config, hf_config, device)
    evaluates = bool(config.data.validation_sources or config.data.validation_fraction)
    sizes, limit = sorted(forward_sizes(config, evaluates=evaluates)), TOLERANCE[precision]
    if twin and config.model.attention in OURS:
        if _computes_in_segments(twin, sizes, device, limit):
            config.model.attention = Attention.segments
        elif config.model.attention is Attention.segments:
            raise no_segments(config)
    config.batch.packing = _packing(config, twin, sizes, limit, device, note)
    if twin and config.model.attention is Attention.auto and config.batch.packing is Packing.best_fit:
        note(
            f"attention of {config.model.name_or_path} stays transformers' {shown(twin.config)}, with a mask over each "
            "whole sequence: it does not take segments"
        )


def _computes_in_segments(twin: Any, sizes: list[int], device: torch.device, limit: float) -> bool:
    """Has a twin compute so, where its packed records then have the logits that they have without us, alone."""
    before = twin.config._attn_implementation
    try:
        if use_segments(twin) and all(packing_difference(twin, size, device) <= limit for size in sizes):
            return True
    except Exception:  # whatever a model makes of segments in place of a mask
        pass
    if twin.config._attn_implementation != before:
        twin.set_attn_implementation(before)
    return False


def _packing(
    config: Config, twin: Any, sizes: list[int], limit: float, device: torch.device, note: Callable[[str], None]
) -> Packing:
    name, is_auto = config.model.name_or_path, config.batch.packing is Packing.auto
    if config.batch.packing is Packing.none:
        return Packing.none
    for num_sequences in sizes if twin else ():
        difference = packing_difference(twin, num_sequences, device)
        if difference <= limit:
            continue
        error = leak_error(config, twin.config, difference, num_sequences)
        if not is_auto:
            raise error
        note(f"{error.what} So each record gets a sequence of its own (batch.packing=auto)")
        return Packing.none
    if twin or not is_auto:  # without a twin the live model is asked later
        return Packing.best_fit
    note(
        f"each record gets a sequence of its own (batch.packing=auto): whether {name} keeps packed records apart is "
        "not known before it is loaded; batch.packing=best_fit asks it then"
    )
    return Packing.none


def forward_sizes(config: Config, *, evaluates: bool) -> set[int]:
    """Sequences in one forward of a run."""
    return {config.batch.micro_batch_size} | ({config.evaluate.batch_size} if evaluates else set())


def leak_error(config: Config, hf_config: Any, difference: float, num_sequences: int) -> ModelError:
    """That packed records see each other."""
    packs = config.batch.packing is not Packing.none
    return ModelError(
        f"{config.model.name_or_path} with {shown(hf_config)} attention lets packed records see each "
        f"other: their logits are {difference:.0%} off in forwards of {num_sequences} sequences.",
        at="batch.packing" if packs else "model.attention",
        do="set batch.packing=none, or try another model.attention."
        if packs
        else "try another model.attention: answers that are compared share a sequence.",
    )


def no_segments(config: Config) -> ModelError:
    """That the model's attention is not one that ours can stand in for."""
    return ModelError(
        f"{config.model.name_or_path} has other logits with attention inside segments, or does not take it.",
        at="model.attention",
        do="set model.attention=auto.",
    )


@torch.no_grad()
def packing_difference(model: Any, num_sequences: int, device: torch.device) -> float:
    """How far the logits of the second of two packed records are from those it has alone, relative to their spread.

    Packed, a model gets the segments; alone, none, and so computes as transformers has it. NaN where logits are not
    finite. Under ZeRO 3 every rank calls it.
    """
    vocabulary = model.get_input_embeddings().num_embeddings
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocabulary, (num_sequences, 2 * RECORD_TOKENS), generator=generator).to(device)
    positions = torch.arange(RECORD_TOKENS, device=device).expand(num_sequences, -1)
    with offering(Segments.of_rows([[RECORD_TOKENS] * 2] * num_sequences, device)):
        packed = _logits(model, ids, positions.repeat(1, 2))[:, RECORD_TOKENS:]
    alone = _logits(model, ids[:, RECORD_TOKENS:], positions)
    return float((packed - alone).norm() / (alone - alone.mean(-1, keepdim=True)).norm())


def _logits(model: Any, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=input_ids, position_ids=position_ids, use_cache=False).logits.float()


def _twin(config: Config, hf_config: Any, device: torch.device) -> tuple[Any, Precision]:
    """A small model that masks as this one does, and its precision; None where none can be made and run.

    fp32, where a leak and rounding lie furthest apart, but for the attention that has no fp32.
    """
    half = config.model.attention is Attention.flash_attention_2
    precision = config.engine.precision if half else Precision.fp32
    for shrink in (_narrow_all, _narrow_mlp, _leave):  # the smallest that this family's own rules allow
        twin_config = copy.deepcopy(hf_config)
        try:
            for part in {id(it): it for it in (twin_config, twin_config.get_text_config())}.values():
                shrink(part)
            with quiet_transformers(), torch.random.fork_rng(devices=[]):
                with torch.device("meta"):
                    empty = empty_model(config.model, copy.deepcopy(twin_config), DTYPES[precision])
                if sum(parameter.numel() for parameter in empty.parameters()) > MAX_TWIN_PARAMETERS:
                    continue
                torch.manual_seed(0)
                twin = empty_model(config.model, twin_config, DTYPES[precision]).to(device).eval()
                _draw(twin)
            packing_difference(twin, 1, device)
        except Exception:  # whatever a model makes of sizes that it was not written for
            continue
        return twin, precision
    return None, precision


def _leave(config: Any) -> None:
    pass


def _narrow_mlp(config: Any) -> None:
    """As few layers as show each kind of layer, a small vocabulary, narrow feed-forward layers."""
    kinds = list(getattr(config, "layer_types", None) or [])
    fewest = max([2, *(1 + kinds.index(kind) for kind in set(kinds))])
    num_layers = getattr(config, "num_hidden_layers", fewest)
    for name, value in list(vars(config).items()):
        if isinstance(value, list | tuple) and len(value) == num_layers:
            setattr(config, name, value[:fewest])
        elif isinstance(value, int) and ("intermediate_size" in name or "ffn" in name or name == "n_inner"):
            setattr(config, name, min(value, TWIN_WIDTH))
        elif isinstance(value, int) and "vocab_size" in name:
            setattr(config, name, min(value, TWIN_VOCABULARY))
        elif name in ("sliding_window", "attention_chunk_size") and isinstance(value, int):
            setattr(config, name, min(value, TWIN_WINDOW))
        elif name in ("pad_token_id", "bos_token_id", "eos_token_id", "num_kv_shared_layers") and value is not None:
            setattr(config, name, 0)
    _lower(config, "num_hidden_layers", fewest)


def _narrow_all(config: Any) -> None:
    """Also narrow hidden states and few heads, where nothing else depends on their number."""
    _narrow_mlp(config)
    _lower(config, "hidden_size", TWIN_WIDTH)
    for name in ("num_attention_heads", "num_key_value_heads", "num_kv_heads"):
        _lower(config, name, TWIN_HEADS)


def _lower(config: Any, name: str, most: int) -> None:
    if isinstance(value := getattr(config, name, None), int) and value > most:
        setattr(config, name, most)


def _draw(model: nn.Module) -> None:
    """Draws the matrices so that every layer counts: drawn at transformers' own 0.02, a leak is small."""
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
