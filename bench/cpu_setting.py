"""What the contestants of cpu_throughput.py share: model, records, batch, optimizer.

One step learns from all records of the setting, so every contestant has the same records in every step, whatever its
own packing and order are, and their losses have to agree step by step.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SEQUENCE_LENGTH = 512
BETAS, EPS, MAX_GRAD_NORM = (0.9, 0.95), 1e-8, 1.0
RANK, ALPHA, DROPOUT = 16, 32, 0.0  # dropout as PEFT has it: with any, no two masks and so no two losses are the same
MEMORY_STEPS = 2
# About 100 M parameters with the vocabulary and the grouped heads of small models as they are published.
MODEL_100M = {
    "vocab_size": 32768,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 23,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
}


@dataclass(frozen=True)
class Kind:
    """A row of the table."""

    size: str  # tiny: conf/model/tiny, or 100m
    adapter: str  # none or lora
    packed_sequences: int  # a step, in one forward of ours
    padded_records: int  # a step: as many as fill the packed sequences
    padded_micro_batch_size: int  # the fastest of 4, 8, 16 and 32 for the tiny model
    learning_rate: float
    warm_up_steps: int
    rounds: int  # of one step


KINDS = {
    "tiny-full": Kind("tiny", "none", 4, 32, 16, 2e-3, 2, 16),
    "tiny-lora": Kind("tiny", "lora", 4, 32, 16, 2e-3, 2, 8),
    "100m-full": Kind("100m", "none", 1, 8, 8, 3e-4, 1, 2),
    "100m-lora": Kind("100m", "lora", 1, 8, 8, 1e-3, 1, 2),
}


def example_rows() -> list[dict[str, str]]:
    from tunesmith.train.paths import resolve_path

    path = Path(resolve_path("conf://data/example/train.jsonl"))
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def model_folder(size: str, scratch: Path) -> str:
    """Config and tokenizer of a model without weights: each contestant draws those of the seed."""
    if size == "tiny":
        return "conf://model/tiny"
    from tunesmith.train.paths import resolve_path

    folder = scratch / "model"
    shutil.copytree(resolve_path("conf://model/tiny"), folder, dirs_exist_ok=True)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | MODEL_100M), encoding="utf-8")
    return str(folder)


def overrides(kind: Kind, scratch: Path, train: Path | str, max_steps: int) -> list[str]:
    """Of a run of ours."""
    lora = [f"adapter.r={RANK}", f"adapter.alpha={ALPHA}", f"adapter.dropout={DROPOUT}"]
    return [
        "model=tiny",
        f"model.name_or_path={model_folder(kind.size, scratch)}",
        "data=example",
        f"data.train={train}",
        "data.validation=[]",
        f"data.cache_dir={scratch / 'cache'}",
        f"adapter={kind.adapter}",
        *(lora if kind.adapter == "lora" else []),
        "engine=ddp",
        "engine.precision=fp32",
        "track=none",
        "checkpoint.at_end=false",
        "schedule=constant",
        "schedule.warmup_fraction=0",
        "schedule.epochs=null",
        f"schedule.max_steps={max_steps}",
        "batch.packing=best_fit",
        f"batch.sequence_length={SEQUENCE_LENGTH}",
        f"batch.global_batch_size={kind.packed_sequences}",
        f"batch.micro_batch_size={kind.packed_sequences}",
        f"optimizer.learning_rate={kind.learning_rate}",
        f"optimizer.beta1={BETAS[0]}",
        f"optimizer.beta2={BETAS[1]}",
        f"optimizer.eps={EPS}",
        f"optimizer.max_grad_norm={MAX_GRAD_NORM}",
    ]


def trainer_arguments(
    kind: Kind, folder: Path, max_steps: int, micro_batch_size: int, accumulation: int
) -> dict[str, Any]:
    """Of TrainingArguments and SFTConfig alike."""
    return {
        "output_dir": str(folder),
        "use_cpu": True,
        "bf16": False,
        "activation_checkpointing": False,
        "per_device_train_batch_size": micro_batch_size,
        "gradient_accumulation_steps": accumulation,
        "max_steps": max_steps,
        "learning_rate": kind.learning_rate,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "adam_beta1": BETAS[0],
        "adam_beta2": BETAS[1],
        "adam_epsilon": EPS,
        "max_grad_norm": MAX_GRAD_NORM,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }


class Prepared:
    """A run of ours up to its prepared data."""

    def __init__(self, config: Any, scratch: Path) -> None:
        import torch

        from tunesmith.train.data.prepare import prepare
        from tunesmith.train.data.tokenizer import load_tokenizer
        from tunesmith.train.model.load import check_model
        from tunesmith.train.model.packing import settle
        from tunesmith.train.objective.objective import make_objective

        self.config, self.scratch = config, scratch
        self.tokenizer = load_tokenizer(config.model, config.data)
        self.write_rows()
        settle(config, check_model(config), torch.device("cpu"), print)
        self.objective = make_objective(config, self.tokenizer)
        self.data = prepare(config, self.tokenizer, self.objective, show_progress=False)

    def write_rows(self) -> None:
        """Writes the file that data.train names; the tokenizer is there."""
        raise NotImplementedError

    def tokenised(self, row: dict[str, str]) -> dict[str, list[int]]:
        """A row as input_ids up to its end-of-turn token, and a completion_mask of the tokens that are learned."""
        question = [{"role": "user", "content": row["prompt"]}]
        answer = [{"role": "assistant", "content": row["completion"]}]
        prompt = self.tokenizer.apply_chat_template(question, add_generation_prompt=True)["input_ids"]
        ids = self.tokenizer.apply_chat_template(question + answer)["input_ids"]
        ids = ids[: len(ids) - ids[::-1].index(self.tokenizer.eos_token_id)]
        return {"input_ids": ids, "completion_mask": [0] * len(prompt) + [1] * (len(ids) - len(prompt))}


class Setting(Prepared):
    """Of one kind: what is ours, and the rows and the model as the others take them."""

    def __init__(self, kind: Kind, scratch: Path) -> None:
        from tunesmith.train.config.compose import compose_config

        self.kind = kind
        self.total_steps = kind.warm_up_steps + kind.rounds
        self.train = scratch / "train.jsonl"
        super().__init__(compose_config(overrides(kind, scratch, self.train, self.total_steps)).config, scratch)
        if self.data.train.num_sequences != kind.packed_sequences:
            raise RuntimeError(f"{self.data.train.num_sequences} packed sequences, not {kind.packed_sequences}.")

    def write_rows(self) -> None:
        self.rows = self._full_rows()
        self.train.write_text("".join(f"{json.dumps(row)}\n" for row in self.rows), encoding="utf-8")

    def _full_rows(self) -> list[dict[str, str]]:
        """The window of the example's rows that fills the packed sequences of a step best."""
        import numpy as np

        from tunesmith.train.data.packing import best_fit_decreasing

        rows = example_rows()
        lengths = np.array([len(self.tokenised(row)["input_ids"]) for row in rows])
        count, best = self.kind.padded_records, (0, 0)
        for start in range(len(rows) - count):
            window = lengths[start : start + count]
            fits = len(best_fit_decreasing(window, SEQUENCE_LENGTH)) == self.kind.packed_sequences
            best = max(best, (int(window.sum()) if fits else 0, start))
        return rows[best[1] : best[1] + count]

    def model(self) -> Any:
        """The model with the weights that ours has, and PEFT's LoRA as it makes it by itself."""
        import torch
        from peft import LoraConfig, get_peft_model

        from tunesmith.train.model.load import load_base

        model = load_base(self.config)
        model.config.use_cache = False
        if self.kind.adapter == "none":
            return model
        torch.manual_seed(self.config.seed)
        lora = LoraConfig(
            r=RANK, lora_alpha=ALPHA, lora_dropout=DROPOUT, target_modules="all-linear", task_type="CAUSAL_LM"
        )
        return get_peft_model(model, lora)
