"""The loop against transformers.Trainer: same weights, rows, order and settings, and the same loss at every step."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

EXAMPLE = Path(__file__).parents[3] / "conf/data/example/train.jsonl"
NUM_ROWS, NUM_STEPS, MICRO_BATCH_SIZE, ACCUMULATION = 200, 50, 2, 2
LEARNING_RATE, WEIGHT_DECAY, BETA1, BETA2, EPS, MAX_GRAD_NORM = 1e-3, 0.1, 0.9, 0.95, 1e-8, 0.5
IGNORED = -100


def overrides(model: Path, data: Path, cache: Path) -> list[str]:
    return [
        f"model.name_or_path={model}",
        f"data.train={data}",
        f"data.cache_dir={cache}",
        "engine=ddp",
        "engine.precision=fp32",
        "track=none",
        "checkpoint.at_end=false",
        "schedule=constant",
        "schedule.epochs=null",
        f"schedule.max_steps={NUM_STEPS}",
        "schedule.warmup_fraction=0",
        "batch.packing=none",
        "batch.sequence_length=128",
        f"batch.micro_batch_size={MICRO_BATCH_SIZE}",
        f"batch.global_batch_size={MICRO_BATCH_SIZE * ACCUMULATION}",
        f"optimizer.learning_rate={LEARNING_RATE}",
        f"optimizer.weight_decay={WEIGHT_DECAY}",
        f"optimizer.beta1={BETA1}",
        f"optimizer.beta2={BETA2}",
        f"optimizer.eps={EPS}",
        f"optimizer.max_grad_norm={MAX_GRAD_NORM}",
    ]


def our_run(rank: Any, overrides: list[str]) -> dict[str, Any]:
    """The real loop: losses, gradient norms and targets of every step, and the row numbers of its micro batches."""
    with rank.ready(overrides) as (loop, recorder):
        loop.train()
        feed = loop.run.feed
        names = [feed.names(step) for step in range(feed.total_steps)]
        return {
            "losses": recorder.losses,
            "grad_norms": [step.grad_norm for step in recorder.steps],
            "target_tokens": [step.target_tokens for step in recorder.steps],
            "rows": [[[int(name.rpartition(":")[2]) - 1 for name in batch] for batch in step] for step in names],
        }


def uneven_rows() -> list[dict[str, str]]:
    """Example rows, every third with question and answer swapped: of like lengths, but with few targets or many."""
    rows = [json.loads(line) for line in EXAMPLE.read_text(encoding="utf-8").splitlines()[:NUM_ROWS]]
    return [
        {"prompt": row["completion"], "completion": row["prompt"]} if number % 3 == 0 else row
        for number, row in enumerate(rows)
    ]


def tokenised(rows: list[dict[str, str]], tokenizer: Any) -> list[dict[str, list[int]]]:
    """Rows as a tutorial prepares them: whole conversations, all but the answer and its end of turn masked."""
    examples = []
    for row in rows:
        question = [{"role": "user", "content": row["prompt"]}]
        answer = [{"role": "assistant", "content": row["completion"]}]
        prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True)["input_ids"]
        ids = tokenizer.apply_chat_template(question + answer)["input_ids"]
        assert ids[: len(prompt)] == prompt
        end = len(ids) - ids[::-1].index(tokenizer.eos_token_id)
        labels = [IGNORED] * len(prompt) + ids[len(prompt) : end] + [IGNORED] * (len(ids) - end)
        examples.append({"input_ids": ids, "labels": labels})
    return examples


def trainer_run(model_dir: Path, examples: list[dict[str, list[int]]], output_dir: Path) -> dict[str, list[float]]:
    """Losses and gradient norms of transformers.Trainer over the examples in their order."""
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        DataCollatorForSeq2Seq,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )

    logged: list[dict[str, float]] = []

    class Recorder(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **rest: Any) -> None:
            if "grad_norm" in logs:
                logged.append(logs)

    class SameDecay(Trainer):
        def get_decay_parameter_names(self, model: Any) -> list[str]:
            """Tunesmith does not decay embeddings; Trainer does, and says to change it here."""
            return [name for name in super().get_decay_parameter_names(model) if "embed_tokens" not in name]

    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype="float32")
    trainer = SameDecay(
        model=model,
        args=TrainingArguments(
            output_dir=str(output_dir),
            use_cpu=True,
            per_device_train_batch_size=MICRO_BATCH_SIZE,
            gradient_accumulation_steps=ACCUMULATION,
            max_steps=NUM_STEPS,
            train_sampling_strategy="sequential",
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            weight_decay=WEIGHT_DECAY,
            adam_beta1=BETA1,
            adam_beta2=BETA2,
            adam_epsilon=EPS,
            max_grad_norm=MAX_GRAD_NORM,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        ),
        train_dataset=examples,  # type: ignore[arg-type]
        data_collator=DataCollatorForSeq2Seq(AutoTokenizer.from_pretrained(model_dir), label_pad_token_id=IGNORED),
        callbacks=[Recorder()],
    )
    trainer.train()
    return {"losses": [row["loss"] for row in logged], "grad_norms": [row["grad_norm"] for row in logged]}


def test_every_loss_is_that_of_transformers_trainer(
    ranks: Callable[[int], Any],
    make_model: Callable[..., Path],
    data_cache: Path,
    tmp_path: Path,
) -> None:
    from transformers import AutoTokenizer

    model = make_model(hidden_size=64, intermediate_size=128)
    rows = uneven_rows()
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    [ours] = ranks(1).run(our_run, overrides=overrides(model, data, data_cache))

    examples = tokenised(rows, AutoTokenizer.from_pretrained(model))
    order = [[[examples[row] for row in batch] for batch in step] for step in ours["rows"]]
    counts = [[sum(label != IGNORED for one in batch for label in one["labels"]) for batch in step] for step in order]
    assert ours["target_tokens"] == [sum(step) for step in counts]
    # Where micro batches have like counts, a mean of their means would pass as well.
    assert max(max(step) / min(step) for step in counts) > 1.5
    in_order = [one for step in order for batch in step for one in batch]
    theirs = trainer_run(model, in_order, tmp_path / "trainer")

    assert len(ours["losses"]) == len(theirs["losses"]) == NUM_STEPS
    assert min(ours["grad_norms"]) > MAX_GRAD_NORM  # clipping is part of every step
    assert ours["losses"] == pytest.approx(theirs["losses"], abs=1e-4, rel=0)
    assert ours["grad_norms"] == pytest.approx(theirs["grad_norms"], rel=1e-3)
    assert ours["losses"][-1] < ours["losses"][0] - 1
