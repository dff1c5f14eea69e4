"""hydra.sweeper.*: each mistake is refused with its key."""

import pytest

from tunesmith.launch.sweeping.settings import SweeperConfig
from tunesmith.train.errors import ConfigError


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"n_trials": 0}, "n_trials"),
        ({"n_jobs": 0}, "n_jobs"),
        ({"ranks_per_trial": 0}, "ranks_per_trial"),
        ({"max_hours": 0.0}, "max_hours"),
        ({"max_gpu_hours": -1.0}, "max_gpu_hours"),
        ({"seed": -1}, "seed"),
        ({"storage": " "}, "storage"),
        ({"study_name": "../up"}, "study_name"),
        ({"metric": "eval/lss"}, "metric"),
        ({"metric": []}, "metric"),
        ({"metric": ["eval/loss", "eval/loss"]}, "metric"),
        ({"direction": "up"}, "direction"),
        ({"direction": ["minimize", "maximize"]}, "direction"),
        ({"pruner": "median", "metric": ["eval/loss", "throughput/mfu"]}, "pruner"),
        ({"pruner": "asha", "metric": "eval/exact_match"}, "pruner"),
        ({"reduction_factor": 1}, "reduction_factor"),
        ({"params": {"adapter.r": [8, 16]}}, "params"),
    ],
)
def test_a_mistake_is_refused(settings: dict[str, object], key: str) -> None:
    with pytest.raises(ConfigError) as error:
        SweeperConfig(**settings)  # type: ignore[arg-type]
    assert error.value.key == f"hydra.sweeper.{key}"


def test_a_metric_knows_which_way_is_better() -> None:
    settings = SweeperConfig(metric=["eval/loss", "throughput/tokens_per_second", "eval/exact_match"])
    assert settings.directions == ["minimize", "maximize", "maximize"]
    assert SweeperConfig(metric="eval/exact_match", direction="minimize").directions == ["minimize"]
