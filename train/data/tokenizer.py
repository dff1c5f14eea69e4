"""A name -> a tokenizer with a chat template, an end-of-text token and a padding token."""

import tempfile
from dataclasses import replace
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from tunesmith.train.config.config import DataConfig, ModelConfig
from tunesmith.train.errors import ConfigError, ModelError
from tunesmith.train.files.disk_errors import reason_of, remedy
from tunesmith.train.paths import resolve_path

# ChatML with the tokenizer's own eos token at the end of every turn: it needs no new token, so no embedding grows.
CHATML_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + eos_token + '\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
# Prompt, completion and eos with nothing around them. A template too, so that a server renders the same.
RAW_TEMPLATE = (
    "{%- for message in messages %}"
    "{%- if message['role'] not in ['user', 'assistant'] or loop.index > 2 %}"
    "{{- raise_exception('data.chat_template=raw takes a prompt and a completion, not a conversation') }}"
    "{%- endif %}"
    "{{- message['content'] }}{%- if message['role'] == 'assistant' %}{{- eos_token }}{%- endif %}"
    "{%- endfor %}"
)
# Padding tokens that tokenizers carry without naming them, the most telling first.
PADDING_NAMES = (
    "<|finetune_right_pad_id|>",
    "<pad>",
    "<|pad|>",
    "[PAD]",
    "<|padding|>",
    "<|PAD_TOKEN|>",
    "<|endoftext|>",
)


def load_tokenizer(model: ModelConfig, data: DataConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, with the chat template the run trains on set, so that saving it ships the template.

    Raises: ModelError when it can't be loaded or saved, is not a fast tokenizer, or has no eos token although the
        template needs one; ConfigError when data.chat_template is not a template.
    """
    tokenizer = _load(model)
    template = _chat_template(tokenizer, data.chat_template)
    if template is not None:
        if tokenizer.eos_token is None:
            raise ModelError(
                f"the tokenizer of {model.name_or_path} has no eos token, so no answer could end.",
                at="model.name_or_path",
                do='name one in its tokenizer_config.json: "eos_token": "...".',
            )
        tokenizer.chat_template = template
    _check_template(tokenizer, data.chat_template)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = _padding_token(tokenizer)
    _check_savable(tokenizer, model.name_or_path)
    return tokenizer


def open_tokenizer(folder: Path, model: ModelConfig) -> PreTrainedTokenizerBase:
    """The tokenizer that a run has saved. Raises ModelError when it can't be loaded, or would run code unasked."""
    return _load(replace(model, name_or_path=str(folder), revision=None))


def adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer puts its bos token before plain text."""
    ids = tokenizer("a").input_ids
    return tokenizer.bos_token_id is not None and bool(ids) and ids[0] == tokenizer.bos_token_id


def _load(model: ModelConfig) -> PreTrainedTokenizerBase:
    name = resolve_path(model.name_or_path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            name, revision=model.revision, trust_remote_code=model.trust_remote_code
        )
    except Exception as error:  # whatever a folder's files or the hub's client can raise
        if not model.trust_remote_code and _needs_its_code(name, error):
            raise ModelError(
                f"{model.name_or_path} brings its own code, which Tunesmith does not run unasked.",
                at="model.name_or_path",
                do="read that code, then set model.trust_remote_code=true.",
            ) from error
        is_path = Path(name).is_absolute() or name.startswith((".", "~")) or model.name_or_path != name
        what = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if is_path and not Path(name).is_dir():
            what = "there is no such folder"
        elif Path(name).is_dir() and not any(Path(name).glob("tokenizer*")):
            what = "the folder holds none"
        raise ModelError(
            f"the tokenizer of {model.name_or_path} can't be loaded: {what}",
            at="model.name_or_path",
            do="give a folder that holds tokenizer.json and tokenizer_config.json, or a hub id; "
            "a gated model needs HF_TOKEN, a machine without internet a folder or a filled HF_HOME.",
        ) from error
    if not getattr(tokenizer, "is_fast", False):
        raise ModelError(
            f"{model.name_or_path} has no fast tokenizer; what is learned is decided from the offsets of one.",
            at="model.name_or_path",
            do="save it with a tokenizer.json; transformers converts most slow tokenizers when sentencepiece is there.",
        )
    return tokenizer


def _needs_its_code(name: str, error: Exception) -> bool:
    """Whether loading failed for want of code in the model's folder: transformers says so, or the folder names some."""
    files = [Path(name, file) for file in ("config.json", "tokenizer_config.json")]
    named = any(file.is_file() and '"auto_map"' in file.read_text(encoding="utf-8", errors="replace") for file in files)
    return named or "trust_remote_code" in str(error)


def _chat_template(tokenizer: PreTrainedTokenizerBase, choice: str) -> str | None:
    """The template to set, or None to keep the tokenizer's own."""
    if choice == "auto":
        if tokenizer.chat_template:
            return None
        return ("{{- bos_token }}" if adds_bos(tokenizer) else "") + CHATML_TEMPLATE
    if choice == "raw":
        return RAW_TEMPLATE
    path = Path(resolve_path(choice))
    if not path.is_file():
        raise ConfigError(
            f"data.chat_template={choice} is neither auto, raw nor a file.",
            key="data.chat_template",
            do="give the path of a .jinja file, or auto or raw.",
        )
    return path.read_text(encoding="utf-8")


def _check_template(tokenizer: PreTrainedTokenizerBase, choice: str) -> None:
    """Raises ConfigError when the template does not render a question and its answer."""
    probe = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    try:
        tokenizer.apply_chat_template(probe, tokenize=False)
    except Exception as error:  # a template is a program of another's: it raises what it likes
        raise ConfigError(
            f"the chat template can't render one question and its answer: {error}",
            key="data.chat_template",
            do="correct the .jinja file." if choice not in ("auto", "raw") else "give a .jinja file.",
        ) from error


def _check_savable(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Raises ModelError when the finished model could not have the tokenizer beside it."""
    try:
        with tempfile.TemporaryDirectory(prefix="tunesmith-") as scratch:
            tokenizer.save_pretrained(scratch)
    except Exception as error:  # transformers, tokenizers and the file system have errors of their own
        problem = reason_of(error)
        raise ModelError(
            f"the tokenizer of {name} cannot be saved, as it is beside the finished model: {problem}.",
            at="model.name_or_path",
            do=remedy(problem, "correct what its tokenizer_config.json or its chat templates say there."),
        ) from error


def _padding_token(tokenizer: PreTrainedTokenizerBase) -> str:
    """A token to pad with that is there already. It may be the eos token: nothing here masks by token id."""
    vocabulary = tokenizer.get_added_vocab()
    for name in PADDING_NAMES:
        if name in vocabulary and name != tokenizer.eos_token:
            return name
    for token in (tokenizer.unk_token, tokenizer.eos_token, tokenizer.bos_token):
        if token is not None:
            return token
    return tokenizer.convert_ids_to_tokens(0)
