"""Writes cookbook.json: what the renderers of Tinker's cookbook give for the conversations of the test beside it.

No extra can hold the cookbook: 0.6.1 needs tml-renderers>=0.4.1, which PyPI has not got for Linux and Python 3.11, and
0.4 to 0.5.8 need transformers<=5.5.4. What its renderers import is enough:

    pip install --no-deps --target /tmp/cookbook tinker-cookbook==0.6.1 tinker chz blobfile termcolor pillow pydantic \
        pydantic-core annotated-types typing-inspection anyio sniffio distro httpx httpcore h11 idna certifi aiohttp
    PYTHONPATH=/tmp/cookbook python tests/train/data/record_cookbook.py
"""

import json
from importlib.metadata import version
from pathlib import Path

from test_independent_renderers import CHATS, PAIRS, cookbook_tokenizer, spans_of
from tinker_cookbook import renderers


def examples(template, renderer, chat):
    """Each with its tokens, and which of them are learned as [start, end) pairs."""
    tokenizer = cookbook_tokenizer(template)
    messages = [{"role": role, "content": text} for role, text in CHATS[chat]]
    made = renderers.get_renderer(renderer, tokenizer).build_supervised_examples(
        messages, renderers.TrainOnWhat.ALL_ASSISTANT_MESSAGES
    )
    return [
        {"tokens": " ".join(tokenizer.convert_ids_to_tokens(list(ids.to_ints()))), "learned": spans_of(weights > 0)}
        for ids, weights in made
    ]


if __name__ == "__main__":
    found = {f"{one} {other} {chat}": examples(one, other, chat) for one, other in PAIRS for chat in CHATS}
    tree = {"tinker-cookbook": version("tinker-cookbook"), "examples": found}
    path = Path(__file__).with_name("cookbook.json")
    path.write_text(json.dumps(tree, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
