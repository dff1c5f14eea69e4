"""The trainings that cpu_throughput.py compares: one setting, in three libraries."""

from collections.abc import Callable
from typing import Any

from cpu_setting import SEQUENCE_LENGTH, Prepared, Setting, trainer_arguments
from measuring import StepDone, Training


def our_loop(prepared: Prepared, world: Any, reporter: Any) -> Any:
    """The real loop of a run of ours; the ranks have met."""
    import torch

    from tunesmith.train.model.kernel_choice import choose_kernels
    from tunesmith.train.run.loop import Loop
    from tunesmith.train.run.setup import make_run, open_session

    device = torch.device("cpu")
    run = make_run(
        prepared.config,
        world,
        device,
        prepared.scratch / "run",
        tokenizer=prepared.tokenizer,
        objective=prepared.objective,
        data=prepared.data,
        kernels=choose_kernels(prepared.config, device),
        reporter=reporter,
    )
    return Loop(run, open_session(run))


def tunesmith(setting: Setting) -> Training:
    """The real loop: its data path, engine and bookkeeping."""
    import torch

    from tunesmith.train.ranks.distributed import World, start
    from tunesmith.train.track.reporter import Reporter

    class Turns(Reporter):
        step_done: StepDone

        def step(self, state: Any, step: Any, **rest: float) -> None:
            self.step_done(step.loss, step.target_tokens)

    reporter = Turns(None)
    if not torch.distributed.is_initialized():
        start(World(), torch.device("cpu"), timeout_minutes=10)
    loop = our_loop(setting, World(), reporter)

    def train(step_done: StepDone) -> None:
        reporter.step_done = step_done
        loop.train()

    return train


def tokenised(setting: Setting) -> list[dict[str, list[int]]]:
    """The rows of the setting. Raises when they are not those that ours learns from."""
    rows = [setting.tokenised(row) for row in setting.rows]
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


def trainer(setting: Setting, micro_batch_size: int | None = None) -> Training:
    """transformers.Trainer, every record padded to SEQUENCE_LENGTH."""
    from datasets import Dataset
    from transformers import Trainer, TrainingArguments, default_data_collator

    kind = setting.kind
    rows = [padded(row, setting.tokenizer.pad_token_id) for row in tokenised(setting)]
    micro_batch_size = micro_batch_size or kind.padded_micro_batch_size
    accumulation = len(rows) // micro_batch_size
    folder = setting.scratch / "trainer"
    arguments = TrainingArguments(
        **trainer_arguments(kind, folder, setting.total_steps, micro_batch_size, accumulation)
    )
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
    """trl.SFTTrainer with best-fit-decreasing packing and the loss it has by default: a fused head, in chunks."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    # One sequence a forward, the fastest of 1, 2 and 4: trl joins more of them into one long row, whose dense mask
    # costs sdpa the square of its length.
    kind = setting.kind
    arguments = SFTConfig(
        **trainer_arguments(kind, setting.scratch / "sft", setting.total_steps, 1, kind.packed_sequences),
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
        if len(trainer.train_dataset) != kind.packed_sequences:
            raise RuntimeError(f"trl packs into {len(trainer.train_dataset)} sequences, not {kind.packed_sequences}.")
        check_fused_head(trainer)
        check_separate(trainer)
        return trainer

    return hugging_face(make, SFTTrainer)


def check_fused_head(trainer: Any) -> None:
    """Raises when the loss takes whole logits from the head: then the peer is weaker than the one that users get."""
    import torch

    def called(*_: Any) -> None:
        raise RuntimeError("trl's head is not fused: the comparison would not be with its default.")

    hook = trainer.model.get_output_embeddings().register_forward_hook(called)
    with torch.no_grad():
        trainer.compute_loss(trainer.model, dict(next(iter(trainer.get_train_dataloader()))))
    hook.remove()


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
