"""The peer's script: transformers.Trainer with DeepSpeed, saved and resumed as its documentation says.

    torchrun --nproc_per_node 2 bench/crash_trainer.py <setting> <ZeRO stage> <trace folder>

Started again after a crash, the same command goes on from get_last_checkpoint(output_dir), as transformers' own example
scripts do; Trainer's resume_from_checkpoint=True is the same look-up, and refuses to run where there is no checkpoint.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

from crash_setting import RUN, Trace, training_arguments


def main(setting: Path, stage: int, trace_folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments
    from transformers.trainer_utils import get_last_checkpoint

    arguments = TrainingArguments(**training_arguments(stage))
    if stage == 3:  # it splits the model while it is loaded: the ranks must have met by then
        import deepspeed

        deepspeed.init_distributed(dist_backend="gloo")
    trace = Trace(trace_folder, int(os.environ["RANK"]))

    class Traced(Trainer):
        def compute_loss(self, model: Any, inputs: Any, *rest: Any, **options: Any) -> Any:
            ids = inputs["input_ids"]
            loss = super().compute_loss(model, inputs, *rest, **options)
            trace.note(self.state.global_step, loss, ids, self.model.parameters())
            return loss

    trainer = Traced(
        model=AutoModelForCausalLM.from_pretrained(setting / "model", dtype="float32"),
        args=arguments,
        train_dataset=json.loads((setting / "tokenised.json").read_text(encoding="utf-8")),
        data_collator=DataCollatorForSeq2Seq(AutoTokenizer.from_pretrained(setting / "model"), label_pad_token_id=-100),
    )
    last = get_last_checkpoint(RUN) if os.path.isdir(RUN) else None
    trainer.train(resume_from_checkpoint=last)
    trainer.save_model(f"{RUN}/model")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
