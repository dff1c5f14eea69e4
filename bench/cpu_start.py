"""One optimizer step as a tutorial of transformers.Trainer or trl.SFTTrainer has it: what start_up.py times.

python bench/cpu_start.py trainer|sft_packed <folder>     the folder is for what the library writes
"""

import json
import sys
from pathlib import Path
from typing import Any

from cpu_setting import KINDS, SEQUENCE_LENGTH, trainer_arguments
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, TrainerCallback

CONF = Path(__file__).parents[1] / "conf"
FIRST_STEP = "first step done"


class Report(TrainerCallback):
    def on_step_end(self, *args: Any, **rest: Any) -> None:
        print(FIRST_STEP, flush=True)


def rows() -> list[dict[str, str]]:
    path = CONF / "data/example/train.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def padded_trainer(model: Any, tokenizer: Any, folder: Path) -> Any:
    from datasets import Dataset
    from transformers import Trainer, TrainingArguments, default_data_collator

    def tokenised(row: dict[str, str]) -> dict[str, list[int]]:
        question = [{"role": "user", "content": row["prompt"]}]
        answer = [{"role": "assistant", "content": row["completion"]}]
        prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True)["input_ids"]
        options = {"padding": "max_length", "max_length": SEQUENCE_LENGTH, "truncation": True}
        whole = tokenizer.apply_chat_template(question + answer, **options)
        labels = [
            id_ if seen and place >= len(prompt) else -100
            for place, (id_, seen) in enumerate(zip(whole["input_ids"], whole["attention_mask"], strict=True))
        ]
        return {**whole, "labels": labels}

    kind = KINDS["tiny-full"]
    arguments = trainer_arguments(
        kind, folder, 1, kind.padded_micro_batch_size, kind.padded_records // kind.padded_micro_batch_size
    )
    dataset = Dataset.from_list(rows()).map(tokenised, remove_columns=["prompt", "completion"])
    return Trainer(
        model=model,
        args=TrainingArguments(**arguments),
        train_dataset=dataset,
        data_collator=default_data_collator,
    )


def sft_packed(model: Any, tokenizer: Any, folder: Path) -> Any:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    kind = KINDS["tiny-full"]
    return SFTTrainer(
        model=model,
        args=SFTConfig(
            **trainer_arguments(kind, folder, 1, 1, kind.packed_sequences),
            packing=True,
            max_length=SEQUENCE_LENGTH,
            completion_only_loss=True,
        ),
        train_dataset=Dataset.from_list(
            [
                {
                    "prompt": [{"role": "user", "content": row["prompt"]}],
                    "completion": [{"role": "assistant", "content": row["completion"]}],
                }
                for row in rows()
            ]
        ),
        processing_class=tokenizer,
    )


def main() -> None:
    name, folder = sys.argv[1], Path(sys.argv[2])
    tokenizer = AutoTokenizer.from_pretrained(CONF / "model/tiny")
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(CONF / "model/tiny"))
    trainer = {"trainer": padded_trainer, "sft_packed": sft_packed}[name](model, tokenizer, folder)
    trainer.add_callback(Report())
    trainer.train()


if __name__ == "__main__":
    main()
