"""Chat templates of real models, as TRL ships them: the ids before an answer are those a server sends."""

import re
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from tunesmith.train.config.config import Targets
from tunesmith.train.data.messages import Message
from tunesmith.train.data.records import Record
from tunesmith.train.data.render import encode_prompt, render
from tunesmith.train.data.template import ChatTemplate, visible_answer
from tunesmith.train.errors import ModelError

MARKER = re.compile(r"<[|｜][^\s<>{}'\"+]{1,40}[|｜]>|</?(?:start|end)_of_\w+>|</?think>|<\|?turn\|?>")
SPEC = find_spec("trl")
FOLDER = Path(SPEC.submodule_search_locations[0]) / "chat_templates" if SPEC else Path("nowhere")
NAMES = ["qwen2_5", "qwen3", "qwen3_instruct_2507", "qwen3_5_think", "llama3", "llama3_1", "gemma", "gemma3", "phi3"]
NAMES += ["deepseek_r1_distill", "gptoss", "cohere", "cohere2", "nemotron_3_nano", "lfm2"]
CHAT = Record(
    "data.jsonl:1",
    [
        Message("user", "hello"),
        Message("assistant", "fine thanks"),
        Message("user", "how are you"),
        Message("assistant", "hello world"),
    ],
)


@pytest.mark.skipif(not FOLDER.is_dir(), reason="trl, which ships the templates, is not installed")
@pytest.mark.parametrize("name", NAMES)
def test_templates_of_real_models(name, make_tokenizer):
    source = (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
    markers = sorted(set(MARKER.findall(source)) - {"<think>", "</think>"})
    tokenizer = make_tokenizer(source, specials=markers, eos="<eos>", bos="<bos>")
    sequences = render(tokenizer, CHAT, Targets.all_turns)
    turns = 0
    for sequence in sequences:
        assert (sequence.input_ids == tokenizer.bos_token_id).sum() == 1
        starts = np.flatnonzero((sequence.weights > 0) & ~np.r_[False, sequence.weights[:-1] > 0])
        for start, (first, end, _) in zip(starts, sequence.spans, strict=True):
            answer = CHAT.messages[2 * turns + 1].content
            assert answer in sequence.text[first:end]
            assert sequence.text[first:end].endswith(">")  # its end-of-turn token
            prompt = [message.as_dict() for message in CHAT.messages[: 2 * turns + 1]]
            assert encode_prompt(tokenizer, prompt) == sequence.input_ids[:start].tolist()
            turns += 1
    assert turns == 2


def test_a_template_that_leaves_out_the_content_is_refused(make_tokenizer):
    """As those of multimodal models do, which take a message as a list of parts."""
    tokenizer = make_tokenizer("{% for m in messages %}{{ m['role'] + '<|im_end|>' }}{% endfor %}")
    with pytest.raises(ModelError, match="leaves out what messages say"):
        render(tokenizer, CHAT, Targets.all_turns)


def test_the_tail_is_found_without_searching_for_text(make_tokenizer):
    template = ChatTemplate(make_tokenizer())
    assert template.tail == "<|im_end|>\n"
    assert template.turn_end("a<|im_end|>\n<|im_start|>b <|im_end|>\n") == ("a<|im_end|>\n<|im_start|>b <|im_end|>", 36)


@pytest.mark.parametrize(
    ("text", "visible"),
    [("a", "a"), ("<think>\nx\n</think>\n\na", "a"), ("\n</think>\n\na", "a"), ("x </p>", "x </p>")],
)
def test_visible_answer_leaves_out_the_thought(text, visible):
    assert visible_answer(text) == visible
