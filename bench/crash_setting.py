"""The training that crash_peer.py breaks: one model, one set of rows, one length, as each side takes them."""

import json
import shutil
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
SIDES = ("tunesmith", "trainer")
WORLD_SIZE, MICRO_BATCH_SIZE, ACCUMULATION = 2, 2, 2
STEPS_PER_EPOCH = 5
NUM_ROWS = WORLD_SIZE * MICRO_BATCH_SIZE * ACCUMULATION * STEPS_PER_EPOCH
NUM_STEPS = 9  # one after the last save: its loss shows what the update before it did
SAVE_EVERY, KEEP = 2, 2
SAVED_STEP = 6  # whose save is broken: the third, so that older ones are there and one of them is removed
LEARNING_RATE, BETAS, EPS, MAX_GRAD_NORM, DROPOUT, SEED = 1e-3, (0.9, 0.95), 1e-8, 1.0, 0.1, 0
SEQUENCE_LENGTH = 128
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
RUN = "run"  # the folder that either side writes to, in the job's own
CHECKPOINTS = f"{RUN}/checkpoint"  # how every path of a checkpoint begins, on either side
FOLDER_OF_STEP = {"tunesmith": f"{RUN}/checkpoints/step-{{:06d}}", "trainer": f"{RUN}/checkpoint-{{}}"}
STEP_TEXT = {"tunesmith": "step-{:06d}", "trainer": "checkpoint-{}"}  # in every path of that step's save
SAFE_STEP = 4  # the newest save that was complete before the broken one began


def write_model(folder: Path) -> None:
    """A Llama of two layers with seeded random weights and dropout, and the tokenizer that ships with Tunesmith."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"vocab_size": 2048, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
    ids = {"pad_token_id": 0, "eos_token_id": 2, "bos_token_id": None}
    torch.manual_seed(SEED)
    config = AutoConfig.for_model("llama", **sizes, **heads, **ids, attention_dropout=DROPOUT, initializer_range=0.2)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    for name in TOKENIZER_FILES:
        shutil.copy(ROOT / "conf/model/tiny" / name, folder)


def write_rows(folder: Path, model: Path) -> None:
    """rows.jsonl as Tunesmith reads them; tokenised.json with the same tokens and labels, for Trainer."""
    from transformers import AutoTokenizer

    lines = (ROOT / "conf/data/example/train.jsonl").read_text(encoding="utf-8").splitlines()[:NUM_ROWS]
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    tokenizer, examples = AutoTokenizer.from_pretrained(model), []
    for row in map(json.loads, lines):
        question = [{"role": "user", "content": row["prompt"]}]
        answer = [{"role": "assistant", "content": row["completion"]}]
        prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True)["input_ids"]
        ids = tokenizer.apply_chat_template(question + answer)["input_ids"]
        ids = ids[: len(ids) - ids[::-1].index(tokenizer.eos_token_id)]
        examples.append({"input_ids": ids, "labels": [-100] * len(prompt) + ids[len(prompt) :]})
    (folder / "tokenised.json").write_text(json.dumps(examples), encoding="utf-8")


def make_setting(folder: Path) -> None:
    """Everything that both sides read, in one folder."""
    write_model(folder / "model")
    write_rows(folder, folder / "model")


def overrides(setting: Path, stage: int) -> list[str]:
    """Arguments of launch/train.py."""
    return [
        f"model.name_or_path={setting / 'model'}",
        f"data.train={setting / 'rows.jsonl'}",
        f"data.cache_dir={setting / 'cache'}",
        f"engine=zero{stage}",
        "engine.precision=fp32",
        "batch.packing=none",
        f"batch.sequence_length={SEQUENCE_LENGTH}",
        f"batch.global_batch_size={WORLD_SIZE * MICRO_BATCH_SIZE * ACCUMULATION}",
        f"batch.micro_batch_size={MICRO_BATCH_SIZE}",
        "schedule=constant",
        "schedule.epochs=null",
        "schedule.warmup_fraction=0",
        f"schedule.max_steps={NUM_STEPS}",
        f"optimizer.learning_rate={LEARNING_RATE}",
        f"optimizer.beta1={BETAS[0]}",
        f"optimizer.beta2={BETAS[1]}",
        f"optimizer.eps={EPS}",
        f"optimizer.max_grad_norm={MAX_GRAD_NORM}",
        f"checkpoint.every_steps={SAVE_EVERY}",
        f"checkpoint.keep_last={KEEP}",
        f"seed={SEED}",
        "track=none",
        "cluster.device=cpu",
        f"output_dir={RUN}",
    ]


def training_arguments(stage: int) -> dict[str, Any]:
    """Of transformers.TrainingArguments."""
    return {
        "output_dir": RUN,
        "deepspeed": {
            "zero_optimization": {"stage": stage},
            "train_batch_size": "auto",
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "gradient_clipping": "auto",
        },
        "use_cpu": True,
        "bf16": False,
        "activation_checkpointing": False,
        "per_device_train_batch_size": MICRO_BATCH_SIZE,
        "gradient_accumulation_steps": ACCUMULATION,
        "max_steps": NUM_STEPS,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "adam_beta1": BETAS[0],
        "adam_beta2": BETAS[1],
        "adam_epsilon": EPS,
        "max_grad_norm": MAX_GRAD_NORM,
        "save_strategy": "steps",
        "save_steps": SAVE_EVERY,
        "save_total_limit": KEEP,
        "seed": SEED,
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }


class Trace:
    """What one rank saw at each forward, in a file outside its run folder: step, loss, token ids and weights."""

    def __init__(self, folder: Path, rank: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._file = (folder / f"rank-{rank}.jsonl").open("a", encoding="utf-8", buffering=1)

    def note(self, step: int, loss: Any, input_ids: Any, parameters: Iterable[Any]) -> None:
        """The loss bit by bit, the rest as CRC-32; a parameter that ZeRO 3 has split counts with this rank's part."""
        weights = 0
        for parameter in parameters:
            mine = getattr(parameter, "ds_tensor", parameter)
            weights = zlib.crc32(mine.detach().numpy().tobytes(), weights)
        ids = zlib.crc32(input_ids.contiguous().numpy().tobytes())
        row = {"step": step, "loss": float(loss.detach()).hex(), "ids": ids, "weights": weights}
        self._file.write(json.dumps(row) + "\n")


def read_trace(folder: Path) -> list[list[dict[str, Any]]]:
    """The whole rows of each rank."""
    found = []
    for rank in range(WORLD_SIZE):
        path = folder / f"rank-{rank}.jsonl"
        lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
        found.append([json.loads(line) for line in lines])
    return found
