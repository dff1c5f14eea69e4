"""Raw keys of DeepSpeed for slow links, which docs/scaling.md names: they change what is sent, not what is learned."""

from collections.abc import Callable
from typing import Any

import pytest


def losses(rank: Any, overrides: list[str]) -> list[float]:
    """On a rank: of the steps of a short run."""
    with rank.ready(overrides) as (loop, _):
        return [loop.step().loss for _ in range(3)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "key"), [(3, "zero_hpz_partition_size=2"), (2, "use_multi_rank_bucket_allreduce=false")]
)
def test_keys_for_slow_links_keep_the_losses(
    stage: int, key: str, ranks: Callable[[int], Any], short_run: Callable[..., list[str]]
) -> None:
    run = short_run(stage, 3, "checkpoint.at_end=false")
    plain = ranks(2).run(losses, overrides=run)
    other = ranks(2).run(losses, overrides=[*run, f"engine.deepspeed.zero_optimization.{key}"])
    assert other[0] == pytest.approx(plain[0], rel=1e-6)
