"""Tool calls in OpenAI's form, whose arguments are JSON text, have the ids of those whose arguments are an object."""

from importlib.util import find_spec
from pathlib import Path

import orjson
import pytest

from tunesmith.train.config.config import Targets
from tunesmith.train.data.records import read_records
from tunesmith.train.data.render import encode_prompt, render
from tunesmith.train.data.sources import find_sources
from tunesmith.train.data.template import ChatTemplate

# How published templates write the arguments, `a` here: family -> code, what it writes, whether it needs JSON text.
FAMILIES = {
    "qwen2.5, llama 3, gpt-oss, hermes": ("{{ a|tojson }}", '{"é": "x y", "n": [1, 2.5]}', False),
    "qwen3, kimi": (
        "{% if a is string %}{{ a }}{% else %}{{ a|tojson }}{% endif %}", '{"é": "x y", "n": [1, 2.5]}', False,
    ),
    "deepseek": ("{{ '```json\n' + a + '\n```' }}", '```json\n{"é": "x y", "n": [1, 2.5]}\n```', True),
    "a template that prints": ("{{ a }}", '{"é": "x y", "n": [1, 2.5]}', True),
    "glm, qwen3-coder": ("{% for k, v in a|items %}<{{ k }}>{{ v }}{% endfor %}", "<é>x y<n>[1, 2.5]", False),
    "gemma 4": (
        "{% if a is mapping %}{% for k in a %}{{ k }}:{{ a[k] }},{% endfor %}{% else %}{{ a }}{% endif %}",
        "é:x y,n:[1, 2.5],", False,
    ),
}  # fmt: skip
TEMPLATE = (
    "{%% for m in messages %%}{{ '<|im_start|>' + m['role'] + '\n' + (m['content'] or '') }}"
    "{%% for call in m['tool_calls'] or [] %%}{%% set a = call['function']['arguments'] %%}"
    "{{ call['function']['name'] + ' ' }}%s{%% endfor %%}{{ '<|im_end|>\n' }}{%% endfor %%}"
    "{%% if add_generation_prompt %%}{{ '<|im_start|>assistant\n' }}{%% endif %%}"
)
OBJECT = {"é": "x y", "n": [1, 2.5]}
FORMS = {"object": OBJECT, "compact": orjson.dumps(OBJECT).decode(), "escaped": '{"\\u00e9" :"x y", "n":[1,2.50]}'}


def conversation(arguments):
    call = {"id": "abcdefgh1", "type": "function", "function": {"name": "find", "arguments": arguments}}
    return [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "abcdefgh1", "name": "find", "content": "4711"},
        {"role": "assistant", "content": "fine thanks"},
    ]


def ids_of(tokenizer, write_jsonl, arguments):
    """Of the call alone, of the whole conversation, and of its prompt as a server sends it."""
    messages = conversation(arguments)
    path = write_jsonl([{"messages": messages[:2]}, {"messages": messages}])
    rendered = [
        part for record in read_records(find_sources([path])) for part in render(tokenizer, record, Targets.all_turns)
    ]
    return [*(part.input_ids.tolist() for part in rendered), encode_prompt(tokenizer, messages[:3])]


@pytest.mark.parametrize(("code", "written", "takes_text"), FAMILIES.values(), ids=FAMILIES)
def test_both_forms_have_the_same_ids(code, written, takes_text, make_tokenizer, write_jsonl):
    tokenizer = make_tokenizer(TEMPLATE % code)
    assert ChatTemplate(tokenizer).takes_text is takes_text
    found = [ids_of(tokenizer, write_jsonl, form) for form in FORMS.values()]
    assert found[0] == found[1] == found[2]
    assert tokenizer.decode(found[0][0]).endswith(f"<|im_start|>assistant\nfind {written}<|im_end|>")


def test_text_that_is_no_json_stays_in_a_conversation(make_tokenizer):
    """A model has written it, to a user who goes on; in a record it is an error (test_records.py)."""
    tokenizer = make_tokenizer(TEMPLATE % "{{ a }}")
    assert "find {nope<|im_end|>" in tokenizer.decode(encode_prompt(tokenizer, conversation("{nope")[:3]))


SPEC = find_spec("trl")
PUBLISHED = ["qwen2_5", "qwen3", "qwen3_5_nothink", "llama3_1", "gptoss", "deepseekv3", "gemma4", "glm4moe"]
FOLDER = Path(SPEC.submodule_search_locations[0]) / "chat_templates" if SPEC else Path("nowhere")


@pytest.mark.skipif(not FOLDER.is_dir(), reason="trl, which ships the templates, is not installed")
@pytest.mark.parametrize(
    "name", ["qwen2_5", "qwen3", "qwen3_5_nothink", "llama3_1", "gptoss", "deepseekv3", "gemma4", "glm4moe"]
)
def test_both_forms_have_the_same_ids_with_published_templates(name, make_tokenizer, write_jsonl):
    tokenizer = make_tokenizer((FOLDER / f"{name}.jinja").read_text(encoding="utf-8"), eos="<eos>", bos="<bos>")
    assert ChatTemplate(tokenizer).takes_text is (name == "deepseekv3")
    found = [ids_of(tokenizer, write_jsonl, form) for form in FORMS.values()]
    assert found[0] == found[1] == found[2]
    text = tokenizer.decode(found[0][0])
    assert "x y" in text
    assert '\\"' not in text
