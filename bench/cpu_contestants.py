"""The trainings that cpu_throughput.py compares: one model, one data set, one length, in three libraries."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from measuring import StepDone, Training

SEQUENCE_LENGTH = 512
SEQUENCES_PER_STEP = 4  # packed
RECORDS_PER_STEP = 32  # padded: what four packed sequences of the example hold
LEARNING_RATE, BETAS, EPS, MAX_GRAD_NORM = 2e-3, (0.9, 0.95), 1e-8, 1.0
WARM_UP_STEPS, ROUNDS, STEPS_PER_TURN = 2, 18, 1
TOTAL_STEPS = WARM_UP_STEPS + ROUNDS * STEPS_PER_TURN
PADDED_MICRO_BATCH_SIZE = 16  # the fastest of 4, 8, 16 and 32 on the machine of bench/results


class Setting:
    """What all contestants share: config, tokenizer, our prepared data, and the rows as the others take them."""

    def __init__(self, scratch: Path) -> None:
        import torch

        from tunesmith.train.config.compose import compose_config
        from tunesmith.train.data.prepare import prepare
        from tunesmith.train.data.tokenizer import load_tokenizer
        from tunesmith.train.model.load import check_model
        from tunesmith.train.model.packing import settle
        from tunesmith.train.objective.objective import make_objective
        from tunesmith.train.paths import resolve_path

        self.scratch = scratch
        overrides = [
            "model=tiny",
            "data=example",
            "data.validation=[]",
            f"data.cache_dir={scratch / 'cache'}",
            "engine=ddp",
            "engine.precision=fp32",
            "track=none",
            "checkpoint.at_end=false",
            "schedule=constant",
            "schedule.warmup_fraction=0",
            "schedule.epochs=null",
            f"schedule.max_steps={TOTAL_STEPS}",
            "batch.packing=best_fit",
            f"batch.sequence_length={SEQUENCE_LENGTH}",
            f"batch.global_batch_size={SEQUENCES_PER_STEP}",
            f"batch.micro_batch_size={SEQUENCES_PER_STEP}",
            f"optimizer.learning_rate={LEARNING_RATE}",
            f"optimizer.beta1={BETAS[0]}",
            f"optimizer.beta2={BETAS[1]}",
            f"optimizer.eps={EPS}",
            f"optimizer.max_grad_norm={MAX_GRAD_NORM}",
        ]
        self.config = compose_config(overrides).config
        settle(self.config, check_model(self.config), torch.device("cpu"), print)
        self.tokenizer = load_tokenizer(self.config.model, self.config.data)
        self.objective = make_objective(self.config, self.tokenizer)
        self.data = prepare(self.config, self.tokenizer, self.objective, show_progress=False)
        path = Path(resolve_path(self.config.data.train_sources[0]))
        self.rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]

    def model(self) -> Any:
        from tunesmith.train.model.load import load_base

        model = load_base(self.config)
        model.config.use_cache = False
        return model

    def arguments(self, micro_batch_size: int, accumulation: int) -> dict[str, Any]:
        """Arguments of TrainingArguments and SFTConfig alike."""
        return {
            "output_dir": str(self.scratch / "trainer"),
            "use_cpu": True,
            "bf16": False,
            "activation_checkpointing": False,
            "per_device_train_batch_size": micro_batch_size,
            "gradient_accumulation_steps": accumulation,
            "max_steps": TOTAL_STEPS,
            "learning_rate": LEARNING_RATE,
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


def tunesmith(setting: Setting) -> Training:
    """The real loop: its data path, engine and bookkeeping."""
    import torch

    from tunesmith.train.model.kernel_choice import choose_kernels
    from tunesmith.train.ranks.distributed import World, start
    from tunesmith.train.run.loop import Loop
    from tunesmith.train.run.setup import make_run, open_session
    from tunesmith.train.track.reporter import Reporter

    class Turns(Reporter):
        step_done: StepDone

        def step(self, state: Any, step: Any, **rest: float) -> None:
            self.step_done(step.loss, step.target_tokens)

    reporter = Turns(None)
    device = torch.device("cpu")
    if not torch.distributed.is_initialized():
        start(World(), device, timeout_minutes=10)
    run = make_run(
        setting.config,
        World(),
        device,
        setting.scratch / "run",
        tokenizer=setting.tokenizer,
        objective=setting.objective,
        data=setting.data,
        kernels=choose_kernels(setting.config, device),
        reporter=reporter,
    )
    loop = Loop(run, open_session(run))

    def train(step_done: StepDone) -> None:
        reporter.step_done = step_done
        loop.train()

    return train


def tokenised(setting: Setting) -> list[dict[str, list[int]]]:
    """Each row as input_ids up to its end-of-turn token, and a completion_mask of the tokens that are learned."""
    rows = []
    for row in setting.rows:
        question = [{"role": "user", "content": row["prompt"]}]
        answer = [{"role": "assistant", "content": row["completion"]}]
        prompt = setting.tokenizer.apply_chat_template(question, add_generation_prompt=True)["input_ids"]
        ids = setting.tokenizer.apply_chat_template(question + answer)["input_ids"]
        ids = ids[: len(ids) - ids[::-1].index(setting.tokenizer.eos_token_id)]
        rows.append({"input_ids": ids, "completion_mask": [0] * len(prompt) + [1] * (len(ids) - len(prompt))})
    ours = setting.data.train
    counts = [sum(len(row[name]) if name == "input_ids" else sum(row[name]) for row in rows) for name in rows[0]]
    if counts != [ours.num_tokens, ours.num_target_tokens]:
        raise RuntimeError(f"tokens and targets: {counts}, ours: {[ours.num_tokens, ours.num_target_tokens]}")
    return rows


def padded(row: dict[str, list[int]], pad_token_id: int) -> dict[str, list[int]]:
    """A tokenised row padded to SEQUENCE_LENGTH, with labels."""
    ids, learned = row["input_ids"], row["completion_mask"]
    padding = SEQUENCE_LENGTH - len(ids)
    return {
        "input_ids": ids + [pad_token_id] * padding,
        "attention_mask": [1] * len(ids) + [0] * padding,
        "labels": [id_ if mask else -100 for id_, mask in zip(ids, learned, strict=True)] + [-100] * padding,
    }


def hugging_face(make: Callable[[type], Any], base: type) -> Training:
    """A Trainer's training; make(class) builds it from a class that reports each step."""
    from transformers import PrinterCallback, TrainerCallback

    class Turns(base):  # type: ignore[misc, valid-type]
        def get_batch_samples(self, *args: Any, **options: Any) -> Any:
            samples, num_items = super().get_batch_samples(*args, **options)
            self.num_targets = int(num_items)
            return samples, num_items

    trainer = make(Turns)
    if trainer.accelerator.num_processes != 1 or trainer.accelerator.distributed_type != "NO":
        raise RuntimeError("accelerate wraps the model for several processes, which costs it time.")

    def train(step_done: StepDone) -> None:
        class Report(TrainerCallback):
            def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **rest: Any) -> None:
                if "loss" in logs:
                    step_done(logs["loss"], trainer.num_targets)

        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(Report())
        trainer.train()

    return train


def trainer(setting: Setting, micro_batch_size: int = PADDED_MICRO_BATCH_SIZE) -> Training:
    """transformers.Trainer, every record padded to SEQUENCE_LENGTH."""
    from datasets import Dataset
    from transformers import Trainer, TrainingArguments, default_data_collator

    rows = [padded(row, setting.tokenizer.pad_token_id) for row in tokenised(setting)]
    arguments = TrainingArguments(**setting.arguments(micro_batch_size, RECORDS_PER_STEP // micro_batch_size))
    return hugging_face(
        lambda cls: cls(
            model=setting.model(),
            args=arguments,
            train_dataset=Dataset.from_list(rows),
            data_collator=default_data_collator,
        ),
        Trainer,
    )


def sft_packed(setting: Setting) -> Training:
    """trl.SFTTrainer with best-fit-decreasing packing."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    # One sequence a forward, the fastest of 1, 2 and 4: trl joins more of them into one long row, whose dense mask
    # costs sdpa the square of its length.
    arguments = SFTConfig(
        **setting.arguments(1, SEQUENCES_PER_STEP),
        packing=True,
        packing_strategy="bfd",
        max_length=SEQUENCE_LENGTH,
        completion_only_loss=True,
    )

    def make(cls: type) -> Any:
        trainer = cls(
            model=setting.model(),
            args=arguments,
            train_dataset=Dataset.from_list(tokenised(setting)),
            processing_class=setting.tokenizer,
        )
        check_separate(trainer)
        return trainer

    return hugging_face(make, SFTTrainer)


def check_separate(trainer: Any) -> None:
    """Raises when a record of a packed sequence can see the one before it."""
    import torch

    batch = next(iter(trainer.get_train_dataloader()))
    position_ids = batch["position_ids"]
    second = int((position_ids[0] == 0).nonzero()[1])
    changed = batch["input_ids"].clone()
    changed[0, :second] = changed[0, :second].flip(0)
    with torch.no_grad():
        logits = [trainer.model(ids, position_ids=position_ids).logits for ids in (batch["input_ids"], changed)]
    if not torch.equal(logits[0][:, second:], logits[1][:, second:]):
        raise RuntimeError("trl's packed records see each other: the comparison would not be one of equals.")
