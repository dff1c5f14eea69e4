"""Train the tiny model's tokenizer on the example data: byte-level BPE, with a ChatML chat template.

python conf/model/tiny/build_tokenizer.py           writes the tokenizer files beside this script
python conf/model/tiny/build_tokenizer.py --check   exits 1 when they are stale
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

HERE = Path(__file__).parent
DATA = HERE.parents[1] / "data" / "example"
VOCAB_SIZE = 2048
PAD, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"
)


def training_texts() -> Iterator[str]:
    """Training prompts and answers, and the role words of the template; nothing held out is seen."""
    yield from ("system\n", "user\n", "assistant\n")
    for line in (DATA / "train.jsonl").read_text("utf-8").splitlines():
        yield from json.loads(line).values()
    for line in (DATA / "chat_train.jsonl").read_text("utf-8").splitlines():
        yield from (message["content"] for message in json.loads(line)["messages"])


def train_tokenizer() -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[PAD, TURN_START, TURN_END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),  # every byte, so that any text round-trips
        show_progress=False,
    )
    bpe.train_from_iterator(training_texts(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=PAD,
        eos_token=TURN_END,
        additional_special_tokens=[TURN_START],
        chat_template=CHAT_TEMPLATE,
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )


def build() -> dict[str, bytes]:
    """File name -> its whole content, as transformers writes it."""
    with tempfile.TemporaryDirectory() as folder:
        train_tokenizer().save_pretrained(folder)
        return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}


def main() -> int:
    parser = argparse.ArgumentParser(description="Train the tiny tokenizer, or check that it is up to date.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when a file is stale")
    check = parser.parse_args().check
    stale = []
    for name, content in build().items():
        path = HERE / name
        if path.exists() and path.read_bytes() == content:
            continue
        stale.append(name)
        if not check:
            path.write_bytes(content)
    if check and stale:
        print(f"stale in {HERE}: {', '.join(stale)}.\n  do: python conf/model/tiny/build_tokenizer.py", file=sys.stderr)
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
