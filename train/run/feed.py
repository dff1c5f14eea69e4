"""Which batches a step has. The loop asks a feed for them, and whoever reports about a step asks it for their names."""

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import torch

from tunesmith.train.config.config import Config, Packing
from tunesmith.train.data.order import GlobalOrder, split_global_batch
from tunesmith.train.data.store import Batch, TokenStore
from tunesmith.train.ranks.distributed import World


class Feed(Protocol):
    """This rank's batches of each step, counted from 0. Position is the step: a resumed run asks for it directly."""

    total_steps: int

    def batches(self, step: int) -> list[Batch]:
        """As many on every rank, on the device."""

    def names(self, step: int) -> list[list[str]]:
        """Where the records of each of those batches came from, file.jsonl:12."""

    def epoch_at(self, step: int) -> float:
        """Passes over the data done before a step."""


@dataclass(frozen=True)
class _Made:
    """The batches of a step, and when their copies to a GPU are done."""

    batches: list[Batch]
    copied: torch.cuda.Event | None

    def on_current_stream(self) -> list[Batch]:
        """The batches, for whose copies the GPU waits, not the host."""
        if self.copied is not None:
            stream = torch.cuda.current_stream()
            stream.wait_event(self.copied)
            for batch in self.batches:
                batch.each(lambda tensor: tensor.record_stream(stream))  # else their memory is free for the next copy
        return self.batches


class StoredFeed:
    """Prepared data in an order that is a function of seed and step alone.

    While a step is computed a thread makes the batches of the next one, and copies them to a GPU beside its work.
    """

    def __init__(
        self, config: Config, store: TokenStore, world: World, device: torch.device, *, pad_token_id: int
    ) -> None:
        self._store = store
        self._world = world
        self._device = device
        self._pad_token_id = pad_token_id
        self._micro_batch_size = config.batch.micro_batch_size
        self._order = GlobalOrder(
            store.num_sequences,
            global_batch_size=config.batch.global_batch_size,
            seed=config.seed,
            lengths=store.lengths if config.batch.packing is Packing.none else None,  # like lengths side by side
        )
        # A new thread is on GPU 0, where each rank would open a context of its own.
        on_device = (lambda: torch.cuda.set_device(device)) if device.type == "cuda" else None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="feed", initializer=on_device)
        self._next: tuple[int, Future[_Made]] | None = None
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        epochs = config.schedule.epochs
        self._num_samples = self._order.num_samples(epochs) if epochs else None
        self.total_steps = config.schedule.max_steps or self._order.steps_for(epochs or 0)

    def batches(self, step: int) -> list[Batch]:
        coming, self._next = self._next, None
        made = coming[1].result() if coming and coming[0] == step else self._make(step)
        if step + 1 < self.total_steps:
            self._next = step + 1, self._thread.submit(self._make, step + 1)
        return made.on_current_stream()

    def _make(self, step: int) -> "_Made":
        on_host = (self._store.batch(ids, pad_token_id=self._pad_token_id) for ids in self._sequences(step))
        if self._copies is None:
            return _Made([batch.to(self._device) for batch in on_host], None)
        with torch.cuda.stream(self._copies):
            batches = [batch.to(self._device) for batch in on_host]
            return _Made(batches, self._copies.record_event())

    def names(self, step: int) -> list[list[str]]:
        places = self._store.places()
        return [self._store.places_of(ids, places) for ids in self._sequences(step)]

    def epoch_at(self, step: int) -> float:
        return self._order.epoch_at(step)

    def _sequences(self, step: int) -> list[list[int]]:
        """Ids of the sequences of each micro batch; -1: an empty one."""
        return split_global_batch(
            self._order.global_batch(step, self._num_samples),
            self._store.lengths,
            micro_batch_size=self._micro_batch_size,
            rank=self._world.rank,
            world_size=self._world.world_size,
        )
