import io

import numpy as np
import pytest
from rich.console import Console

from tunesmith.train.config.config import Packing
from tunesmith.train.data.example import Example
from tunesmith.train.data.preview import preview
from tunesmith.train.data.store import TokenStore, write_store


@pytest.fixture
def store(make_tokenizer, tmp_path):
    tokenizer = make_tokenizer()
    prompt, answer = tokenizer.encode("hello é😀\n"), tokenizer.encode(" you é<|im_end|>")
    ids = np.array(prompt + answer, dtype=np.int32)
    weights = np.array([0] * len(prompt) + [1] * len(answer), dtype=np.float32)
    write_store(
        tmp_path / "store", [Example("data.jsonl:7", ids, weights)], sequence_length=32, packing=Packing.best_fit
    )
    return TokenStore(tmp_path / "store", sequence_length=32, packing=Packing.best_fit)


def shown(renderable, **console):
    file = io.StringIO()
    Console(file=file, width=100, **console).print(renderable)
    return file.getvalue()


def test_targets_are_marked_where_there_are_no_colours(make_tokenizer, store):
    num_tokens, num_targets = store.num_tokens, store.num_target_tokens
    assert shown(preview(make_tokenizer(), store, 2)) == (
        f"data.jsonl:7: {num_tokens} tokens, {num_targets} targets\nhello é😀\n[[ you é<|im_end|>]]\n"
    )


def test_targets_are_coloured_on_a_terminal(make_tokenizer, store):
    text = shown(preview(make_tokenizer(), store, 1), force_terminal=True, color_system="standard", _environ={})
    assert "[[" not in text
    assert "\x1b[30;42m" in text  # black on green


def test_no_records_are_no_lines(make_tokenizer, store):
    assert shown(preview(make_tokenizer(), store, 0)).strip() == ""
