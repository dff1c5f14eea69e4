"""What stands beside the weights: every stop id, whatever the base model's generation config says; tried beforehand."""

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from tunesmith.train.answer.export import Draft, saved_names
from tunesmith.train.answer.merge import merge
from tunesmith.train.answer.model_folder import finished_generation_config, try_settings, write_settings
from tunesmith.train.config.compose import compose_config
from tunesmith.train.data.render import encode_prompt
from tunesmith.train.data.tokenizer import load_tokenizer
from tunesmith.train.errors import ModelError
from tunesmith.train.files import disk_errors
from tunesmith.train.files.run_folder import create
from tunesmith.train.model.load import load_base, load_model
from tunesmith.train.ranks.distributed import World

CPU = torch.device("cpu")
END_OF_TURN = 2
BASE_STOPS = [5, 7, 9]
# transformers refuses to write it again once an id is changed: sampling settings without do_sample.
GENERATION = {
    "eos_token_id": BASE_STOPS,
    "temperature": 0.6,
    "top_p": 0.9,
    "repetition_penalty": 1.05,
    "max_length": 99,
}
QUESTION = [{"role": "user", "content": "How do I water it?"}]
ANSWER = "Twice a week."


@pytest.fixture
def base(make_model: Callable[..., Path], tmp_path: Path) -> Path:
    """A model that answers ANSWER to anything, ends its turn, and then goes on; three stop ids, none of them ours."""
    folder = tmp_path / "base"
    shutil.copytree(make_model("llama", tie_word_embeddings=False), folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    chain = [*encode_prompt(tokenizer, QUESTION)[-1:], *tokenizer(ANSWER).input_ids, END_OF_TURN, 11, 12, 13]
    assert len(set(chain)) == len(chain)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.norm.weight.fill_(1)
        model.lm_head.weight.zero_()
        model.lm_head.weight[chain[1:]] = model.model.norm(model.model.embed_tokens.weight[chain[:-1]])
    model.config.eos_token_id = BASE_STOPS[0]
    model.save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps(GENERATION))
    return folder


def config_of(base: Path, *overrides: str) -> Any:
    own = [f"model.name_or_path={base}", "batch.sequence_length=64", "engine.precision=fp32", *overrides]
    return compose_config(["+exp=debug", "model=hub", *own])


def answered(folder: Path, **options: Any) -> list[int]:
    """What plain transformers generates from a folder after the question."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor([encode_prompt(tokenizer, QUESTION)])
    model = AutoModelForCausalLM.from_pretrained(folder)
    return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, **options)[
        0, ids.shape[1] :
    ].tolist()


def finished_run(base: Path, folder: Path, adapter: str) -> Path:
    """A run folder with a written model in it, as export.write() leaves it."""
    composed = config_of(base, f"adapter={adapter}")
    create(folder, yaml.safe_dump(composed.resolved))
    model = load_model(composed.config, World())
    tokenizer = load_tokenizer(composed.config.model, composed.config.data)
    draft = Draft(folder / "model", "model" if adapter == "none" else "adapter_model")
    parameters = dict(model.named_parameters())
    for name, saved in saved_names(model, composed.config).items():
        if name in parameters:
            draft.add(saved, parameters[name])
    draft.finish(lambda: write_settings(folder / "model", model, tokenizer, composed.config))
    assert not draft.problem
    return folder


@pytest.mark.parametrize("adapter", ["none", "lora"])
def test_plain_generate_ends_where_training_ended(adapter: str, base: Path, tmp_path: Path) -> None:
    run = finished_run(base, tmp_path / "run", adapter)
    folder = run / "model"
    if adapter == "lora":
        merge(run, tmp_path / "merged")
        folder = tmp_path / "merged"
    written = json.loads((folder / "generation_config.json").read_text())
    assert written["eos_token_id"] == [*BASE_STOPS, END_OF_TURN]
    assert written == GENERATION | {
        key: written[key] for key in ("eos_token_id", "pad_token_id", "transformers_version")
    }
    ids = AutoTokenizer.from_pretrained(folder)(ANSWER).input_ids
    assert answered(folder) == [*ids, END_OF_TURN]
    GenerationConfig.from_pretrained(folder)


def test_an_adapters_folder_names_its_stop_ids_too(base: Path, tmp_path: Path) -> None:
    """transformers and PEFT take the base model's generation config unless they are given another."""
    folder = finished_run(base, tmp_path / "run", "lora") / "model"
    generation = GenerationConfig.from_pretrained(folder)
    assert generation.eos_token_id == [*BASE_STOPS, END_OF_TURN]
    assert answered(folder, generation_config=generation)[-1] == END_OF_TURN
    assert answered(folder)[-1] != END_OF_TURN


def test_stop_ids_of_an_old_config_json_are_kept_without_a_file_of_their_own(base: Path) -> None:
    """from_config(), which ZeRO 3 and random weights start from, reads no generation config at all."""
    random = config_of(base, "model.random_weights=true").config
    assert load_base(random).generation_config.to_diff_dict().items() >= {"top_p": 0.9, "max_length": 99}.items()
    (base / "generation_config.json").unlink()
    settings = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(settings | {"eos_token_id": BASE_STOPS, "temperature": 0.7}))
    found = load_base(random).generation_config
    assert (found.eos_token_id, found.temperature) == (BASE_STOPS, 0.7)


def test_a_model_that_sees_has_its_stop_ids_in_the_config_of_its_text_part(base: Path) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = sizes | {"vocab_size": 2048, "eos_token_id": BASE_STOPS}
    settings = AutoConfig.for_model("gemma3", text_config=text, vision_config=sizes | {"image_size": 56})
    assert not hasattr(settings, "eos_token_id")
    model = AutoModelForCausalLM.from_config(settings)
    model.generation_config = GenerationConfig()
    config = config_of(base).config
    tokenizer = load_tokenizer(config.model, config.data)
    assert finished_generation_config(model, tokenizer).eos_token_id == [*BASE_STOPS, END_OF_TURN]


def test_a_tokenizer_that_cannot_be_saved_is_found_before_the_training(base: Path) -> None:
    path = base / "tokenizer_config.json"
    template = (base / "chat_template.jinja").read_text()
    (base / "chat_template.jinja").unlink()
    templates = [{"name": "default", "template": template}, {"name": "../../../x", "template": "stray"}]
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": templates}))
    config = config_of(base).config
    with pytest.raises(ModelError) as caught:
        load_tokenizer(config.model, config.data)
    assert "cannot be saved" in caught.value.what
    assert "../../../x" in caught.value.what
    assert "space" not in str(caught.value.do)


def test_what_cannot_be_written_is_found_with_the_live_model(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(base, "adapter=lora").config
    model, tokenizer = load_model(config, World()), load_tokenizer(config.model, config.data)
    try_settings(model, tokenizer, config, World(), CPU)
    model.peft_config["default"].target_modules = {object()}  # no JSON
    with pytest.raises(ModelError, match="could not be written after the training, and nothing is trained: TypeError"):
        try_settings(model, tokenizer, config, World(), CPU)


@pytest.mark.parametrize("number", [errno.EPERM, errno.EACCES, errno.EROFS, errno.EIO, errno.ENAMETOOLONG])
def test_only_a_full_disk_is_told_to_free_space(number: int) -> None:
    full, other = (f"OSError: {os.strerror(each)}: model" for each in (errno.ENOSPC, number))
    assert disk_errors.remedy(full, "report this") == "free space there"
    assert disk_errors.remedy("SafetensorError: I/O error: No space left on device (os error 28)", "") == (
        "free space there"
    )
    assert disk_errors.remedy(other, "report this") not in ("free space there", "report this")
    assert disk_errors.remedy("ValueError: no path", "report this") == "report this"
