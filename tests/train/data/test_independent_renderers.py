"""Ids and targets beside those of two independent renderers, in published templates; every difference has its reason.

transformers' `{% generation %}` marks, in the versions of published templates that TRL ships with them (`trl` is in the
`dev` extra; transformers itself and ../shared/data have none). And Tinker's cookbook, whose renderers are Python and no
templates: record_cookbook.py wrote down in cookbook.json what they give for the same templates and conversations.

The tokenizer here has a token a byte: the cookbook tokenises a conversation in pieces, and so merges other letters than
a server, which tokenises the prompt as a whole. That ours are the server's is held by test_render.py.
"""

import json
import re
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tunesmith.train.config.config import Targets
from tunesmith.train.data.messages import Message
from tunesmith.train.data.records import Record
from tunesmith.train.data.render import render
from tunesmith.train.errors import TunesmithError

SPEC = find_spec("trl")
FOLDER = Path(SPEC.submodule_search_locations[0]) / "chat_templates" if SPEC else Path("nowhere")
pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="trl, which ships the templates, is not installed")
MARKER = re.compile(r"<[|｜][^\s<>{}'\"+]{1,40}[|｜]>|</?(?:start|end)_of_\w+>|</?think>|<\|?turn\|?>")
CHAT = [("user", "hello"), ("assistant", "fine thanks"), ("user", "how are you"), ("assistant", "hello world")]
RECORD = Record("data.jsonl:1", [Message(role, text) for role, text in CHAT])
DICTS = [message.as_dict() for message in RECORD.messages]

# Template -> what its marks learn besides, before and after each answer; after the last one where that is more.
# Before: what the generation prompt has given already, so that the model is never asked for it.
# After: what follows the end-of-turn token, at which a server stops.
MARKED = {
    **dict.fromkeys(("cohere", "cohere2", "glm4moe", "llama3"), ("", "", "")),
    **dict.fromkeys(("diffusion_gemma", "gemma", "gemma3", "lfm2", "lfm2_v2", "qwen2_5_vl"), ("", "\n", "\n")),
    **dict.fromkeys(("qwen3", "qwen3_instruct_2507", "qwen3_vl"), ("", "\n", "\n")),
    **dict.fromkeys(("gptoss", "muse_glimmer"), ("<|start|>assistant", "", "")),
    **dict.fromkeys(("phi3", "phi3_5"), ("", "\n", "\n<eos>")),
    **dict.fromkeys(("qwen3_5_think", "qwen3_6", "qwen3_8"), ("<think>\n", "\n", "\n")),
    "qwen3_5_nothink": ("<think>\n\n</think>\n\n", "\n", "\n"),
    "qwen2_5": ("\n", "\n", "\n"),
}
# The generation prompt opens a thought, and the template leaves it out of an answer that has none: the marks are in a
# text that no prompt leads to. Ours is the prompt, and the answer closes the thought.
OPENED = {
    **dict.fromkeys(("deepseek_r1_distill", "deepseekv3"), "<think>\n[[\n</think>\n\nhello world<｜end▁of▁sentence｜>"),
    **dict.fromkeys(
        [f"nemotron_3_{size}" for size in ("nano", "super", "ultra", "5_lightning")],
        "<think>\n[[</think>hello world<|im_end|>",
    ),
}
REFUSED = ("idefics3", "llava_next", "smolvlm")  # of models that see: they take a message as a list of parts


def tokenizer_of(name, *, eos="<eos>", bos="<bos>", specials=()):
    source = (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    names = dict.fromkeys([*sorted(MARKER.findall(source)), *specials, eos, bos])
    # As in Qwen's tokenizer, <think> is a token that text may spell.
    backend.add_tokens([AddedToken(name, special="think>" not in name, normalized=False) for name in names])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos, bos_token=bos)
    tokenizer.chat_template = source
    return tokenizer


def spans_of(mask):
    edges = np.flatnonzero(np.diff(np.r_[0, np.asarray(mask) != 0, 0]))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


@pytest.mark.parametrize("name", MARKED)
def test_generation_marks(name):
    tokenizer = tokenizer_of(f"{name}_training")
    before, after, after_last = MARKED[name]
    num_turns = 0
    for ours in render(tokenizer, RECORD, Targets.all_turns):
        spans = spans_of(ours.weights)
        num_turns += len(spans)
        theirs = tokenizer.apply_chat_template(
            DICTS[: 2 * num_turns], return_dict=True, return_assistant_tokens_mask=True
        )
        ids = theirs["input_ids"]
        assert ids[: len(ours.input_ids)] == ours.input_ids.tolist()
        marked = spans_of(theirs["assistant_masks"])[-len(spans) :]
        for number, ((start, end), (first, last)) in enumerate(zip(spans, marked, strict=True), start=1):
            assert tokenizer.decode(ids[first:start]) == before
            is_last = num_turns - len(spans) + number == len(DICTS) // 2
            assert tokenizer.decode(ids[end:last]) == (after_last if is_last else after)
    assert num_turns == 2


@pytest.mark.parametrize("name", OPENED)
def test_a_prompt_that_opens_a_thought_is_closed_where_the_marks_leave_it_out(name):
    tokenizer = tokenizer_of(f"{name}_training", eos=OPENED[name].rpartition("world")[2])
    ours = render(tokenizer, RECORD, Targets.all_turns)[-1]
    ((start, end),) = spans_of(ours.weights)
    prompt = tokenizer.apply_chat_template(DICTS[:3], add_generation_prompt=True, return_dict=False)
    assert ours.input_ids[:start].tolist() == prompt
    text = f"{tokenizer.decode(prompt)}[[{tokenizer.decode(ours.input_ids[start:end])}"
    assert text.endswith(OPENED[name])
    whole = tokenizer.apply_chat_template(DICTS, tokenize=False)
    assert not whole.startswith(tokenizer.decode(prompt))


@pytest.mark.parametrize("name", REFUSED)
def test_templates_that_take_no_text_are_refused(name):
    with pytest.raises(TunesmithError):
        render(tokenizer_of(f"{name}_training"), RECORD, Targets.all_turns)


# (template, renderer) whose ids and targets are the same.
AGREED = [
    ("llama3", "llama3"),
    ("qwen3", "qwen3"),
    ("qwen3_instruct_2507", "qwen3_instruct"),
    ("qwen3_5_think", "qwen3_5"),
    ("qwen3_5_nothink", "qwen3_5_disable_thinking"),
    ("qwen3_6", "qwen3_5"),
    ("gptoss", "gpt_oss_medium_reasoning"),
]
# (template, renderer) -> what the cookbook has before the last answer's learned part, and why. Ours is in OPENED.
# DeepSeek-V3.1's renderer asks for an answer without a thought by </think>, the template, of R1's kind, by <think>\n.
# Nemotron's writes the answer as the template writes it in a history, not as the template asks for it.
OTHER_PROMPTS = {
    ("deepseekv3", "deepseekv3"): "<｜Assistant｜></think>[[hello world<｜end▁of▁sentence｜>",
    ("nemotron_3_nano", "nemotron3"): "<think></think>[[hello world<|im_end|>",
}
TOKENS = {
    "llama3": ("<|eot_id|>", "<|begin_of_text|>"),
    "deepseekv3": ("<｜end▁of▁sentence｜>", "<｜begin▁of▁sentence｜>"),
    "gptoss": ("<|return|>", "<bos>"),
}
SPECIALS = ("<|im_start|>", "<|im_end|>", "<|start|>", "<|end|>", "<|channel|>", "<|message|>", "<think>", "</think>")
SPECIALS += ("<|start_header_id|>", "<|end_header_id|>", "<｜User｜>", "<｜Assistant｜>")


CHATS = {"one": CHAT[:2], "two": CHAT, "system": [("system", "be kind"), *CHAT]}
PAIRS = [*AGREED, *OTHER_PROMPTS, ("qwen3_8", "qwen3_8_xhigh_reasoning")]
RECORDED = json.loads(Path(__file__).with_name("cookbook.json").read_text(encoding="utf-8"))


def cookbook_tokenizer(template):
    eos, bos = TOKENS.get(template, ("<|im_end|>", "<bos>"))
    return tokenizer_of(template, eos=eos, bos=bos, specials=SPECIALS)


def cookbook(template, renderer, chat):
    """(tokenizer, ours, theirs): lists of (ids, is learned)."""
    tokenizer = cookbook_tokenizer(template)
    record = Record("data.jsonl:1", [Message(role, text) for role, text in CHATS[chat]])
    rendered = render(tokenizer, record, Targets.all_turns)
    ours = [(one.input_ids.tolist(), (one.weights > 0).tolist()) for one in rendered]
    theirs = []
    for example in RECORDED["examples"][f"{template} {renderer} {chat}"]:
        ids = tokenizer.convert_tokens_to_ids(example["tokens"].split(" "))
        assert None not in ids
        theirs.append((ids, [any(start <= at < end for start, end in example["learned"]) for at in range(len(ids))]))
    return tokenizer, ours, theirs


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize(("template", "renderer"), AGREED, ids=[f"{one}-{other}" for one, other in AGREED])
def test_the_cookbook_agrees(template, renderer, chat):
    _, ours, theirs = cookbook(template, renderer, chat)
    assert ours == theirs


@pytest.mark.parametrize(("pair", "expected"), OTHER_PROMPTS.items(), ids=[one for one, _ in OTHER_PROMPTS])
def test_where_the_cookbook_asks_in_another_way(pair, expected):
    tokenizer, ours, theirs = cookbook(*pair, "two")
    for (ids, mask), end_of_text in ((theirs[-1], expected), (ours[-1], OPENED[pair[0]])):
        start, end = spans_of(mask)[-1]
        assert f"{tokenizer.decode(ids[:start])}[[{tokenizer.decode(ids[start:end])}".endswith(end_of_text)


@pytest.mark.parametrize("chat", CHATS)
def test_the_cookbook_makes_an_example_a_turn_where_one_will_do(chat):
    """Qwen3.8's template keeps earlier thoughts, so that later turns leave the earlier ones as they are."""
    _, ((ids, mask),), theirs = cookbook("qwen3_8", "qwen3_8_xhigh_reasoning", chat)
    together = np.zeros(len(ids), dtype=bool)
    for example, learned in theirs:
        assert ids[: len(example)] == example
        together[: len(learned)] |= learned
    assert together.tolist() == mask
