"""The next step's batches are made while a step is computed, and are those that the step has anyway."""

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tunesmith.train.config.compose import compose_config
from tunesmith.train.config.config import Packing
from tunesmith.train.data.example import Example
from tunesmith.train.data.store import Batch, TokenStore, write_store
from tunesmith.train.ranks.distributed import World
from tunesmith.train.run.feed import StoredFeed


class WatchedStore(TokenStore):
    """Notes which thread makes batches."""

    threads: list[str]
    fails_beside = False

    def batch(self, *args: Any, **given: Any) -> Batch:
        self.threads.append(threading.current_thread().name)
        if self.fails_beside and threading.current_thread() is not threading.main_thread():
            raise OSError("the disk has gone")
        return super().batch(*args, **given)


@pytest.fixture
def store(tmp_path: Path) -> WatchedStore:
    examples = [
        Example(input_ids=np.full(12, number), weights=np.ones(12, dtype=np.float32), place=f"x:{number}")
        for number in range(40)
    ]
    write_store(tmp_path / "data", examples, sequence_length=32, packing=Packing.best_fit)
    store = WatchedStore(tmp_path / "data", sequence_length=32, packing=Packing.best_fit)
    store.threads = []
    return store


def feed_of(store: TokenStore) -> StoredFeed:
    config = compose_config(["+exp=debug", "batch.global_batch_size=4", "batch.micro_batch_size=2"]).config
    config.schedule.epochs, config.schedule.max_steps = None, 6
    return StoredFeed(config, store, World(), torch.device("cpu"), pad_token_id=0)


def ids(batches: list[Batch]) -> list[list[list[int]]]:
    return [batch.inputs["input_ids"].tolist() for batch in batches]


def test_a_thread_makes_the_next_step_and_any_other_is_made_when_it_is_asked_for(store: WatchedStore) -> None:
    right = [ids(feed_of(store).batches(step)) for step in range(6)]
    feed = feed_of(store)
    store.threads.clear()
    found = {step: ids(feed.batches(step)) for step in (0, 1, 4, 2, 5)}  # 4 and 2: as after a roll-back
    assert found == {step: right[step] for step in found}
    feed._thread.shutdown()
    mine = store.threads.count(threading.current_thread().name)
    assert mine == 2 * 4  # two forwards of steps 0, 4, 2 and 5
    assert len(store.threads) - mine == 2 * 4  # of 1, 2, 5 and 3, of which 1 was wanted; after 5 there is none


def test_what_goes_wrong_while_it_is_made_is_raised_when_it_is_asked_for(store: WatchedStore) -> None:
    store.fails_beside = True
    feed = feed_of(store)
    feed.batches(0)
    with pytest.raises(OSError, match="the disk has gone"):
        feed.batches(1)
