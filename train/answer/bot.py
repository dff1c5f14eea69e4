"""A finished run, ready to answer."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from transformers import TextIteratorStreamer

from tunesmith.train.answer.generate import answers, own_generation_config_only, room_for
from tunesmith.train.config.compose import load_resolved
from tunesmith.train.data.prepare import Question
from tunesmith.train.data.render import encode_prompt, stop_token_ids
from tunesmith.train.data.template import visible_answer
from tunesmith.train.data.tokenizer import open_tokenizer
from tunesmith.train.errors import ConfigError
from tunesmith.train.files import run_folder
from tunesmith.train.model.load import num_positions, open_model, quiet_transformers
from tunesmith.train.ranks.distributed import World


class Bot:
    """The model, tokenizer and template of a run folder. Raises ConfigError when the run left no model.

    temperature 0 is greedy; above it, tokens are drawn from the softmax of logits / temperature.
    """

    def __init__(self, run_dir: Path, *, max_new_tokens: int = 256, temperature: float = 0.0) -> None:
        folder = run_dir / run_folder.MODEL
        if not folder.is_dir():
            raise ConfigError(
                f"{run_dir} has no model yet.", at="run", do="let the training finish, or give another run."
            )
        self.config = load_resolved(run_dir / run_folder.CONFIG)
        with quiet_transformers():
            self.tokenizer = open_tokenizer(folder, self.config.model)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = open_model(folder, self.config).to(self.device)
        self.stop_ids = stop_token_ids(self.tokenizer)
        self._max_new_tokens = max_new_tokens
        self._sampling: dict[str, Any] = {"do_sample": False}
        if temperature > 0:
            self._sampling = {"do_sample": True, "temperature": temperature, "top_p": 1.0, "top_k": 0}

    def answers(
        self, questions: Sequence[Question], batch_size: int, progress: Callable[[int, int], None] | None = None
    ) -> list[str]:
        """The greedy answer to each question."""
        found = answers(
            self.model,
            questions,
            world=World(),
            device=self.device,
            batch_size=batch_size,
            max_new_tokens=self._max_new_tokens,
            stop_ids=self.stop_ids,
            pad_token_id=self.tokenizer.pad_token_id,
            progress=progress,
        )
        return [visible_answer(self.tokenizer.decode(ids, skip_special_tokens=True)) for ids in found]

    def stream(self, messages: list[dict[str, Any]]) -> Iterator[str]:
        """The answer to a conversation, piece by piece as it is made."""
        ids = torch.tensor([encode_prompt(self.tokenizer, messages)], device=self.device)
        positions = num_positions(self.model.config) or ids.shape[1] + 1
        if ids.shape[1] >= positions:
            raise ConfigError(
                f"the conversation has {ids.shape[1]} tokens, the model has {positions} positions.",
                at="chat",
                do="start a new conversation.",
            )
        streamer = TextIteratorStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        arguments = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "max_new_tokens": room_for(self.model, ids.shape[1], self._max_new_tokens),
            "eos_token_id": self.stop_ids,
            "pad_token_id": self.tokenizer.pad_token_id,
            "streamer": streamer,
            **self._sampling,
        }
        failures: list[Exception] = []

        def generate() -> None:
            try:
                with own_generation_config_only(self.model):
                    self.model.generate(**arguments)
            except Exception as error:
                failures.append(error)
                streamer.end()  # or the reader would wait for ever

        thread = Thread(target=generate, daemon=True)
        thread.start()
        yield from streamer
        thread.join()
        if failures:
            raise failures[0]
