"""The next point of a space: the next one of the grid, a random one, or the one that TPE expects most of.

What was tried decides, nothing else: a driver that is started again, or a second one, proposes what the first would.
"""

import math
import random
import warnings
from collections.abc import Sequence

import optuna
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial

from tunesmith.launch.sweeping.settings import Sampler, SweeperConfig
from tunesmith.launch.sweeping.space import Point, Space

DRAWS = 32  # before a space of values is taken for used up, and the rest of it listed
LISTED = 100_000  # points of a space that are listed to find an unused one


def propose(space: Space, settings: SweeperConfig, trials: Sequence[FrozenTrial]) -> Point | None:
    """A point that no trial has had; None when there is none left."""
    used = {_key(space, trial.params) for trial in trials}
    if space.size is not None and len(used) >= space.size:
        return None
    if settings.sampler is Sampler.grid:
        return next((point for point in space.points() if _key(space, point) not in used), None)
    for draw in range(DRAWS):
        point = _draw(space, settings, trials, draw)
        if _key(space, point) not in used:
            return point
    left = [point for _, point in zip(range(LISTED), space.points(), strict=False) if _key(space, point) not in used]
    return random.Random(settings.seed).choice(left) if left else None


def _draw(space: Space, settings: SweeperConfig, trials: Sequence[FrozenTrial], draw: int) -> Point:
    """In a study of its own, so that a point that is not wanted leaves no trace in the real one."""
    seed = random.Random(f"{settings.seed} {len(trials)} {draw}").randrange(2**31)
    directions = [StudyDirection[way.upper()] for way in settings.directions]
    study = optuna.create_study(directions=directions, sampler=_sampler(settings, seed))
    study.add_trials(trials)
    return dict(study.ask(dict(space.dimensions)).params)


def _sampler(settings: SweeperConfig, seed: int) -> BaseSampler:
    if settings.sampler is Sampler.random:
        return RandomSampler(seed=seed)
    with warnings.catch_warnings():  # gamma goes in Optuna 6, which pyproject.toml does not admit
        warnings.filterwarnings("ignore", message="`gamma` has been deprecated", category=FutureWarning)
        return TPESampler(seed=seed, n_startup_trials=settings.n_startup_trials, multivariate=True, gamma=_num_good)


def _num_good(num_trials: int) -> int:
    """How many of the trials TPE takes for good ones: a quarter of them.

    Trainings are few. With Optuna's own tenth the good one of 12 trials is a single point, and half of what it proposes
    is random: over 25 seeds on a curve like that of a learning rate, trials 5 to 12 had a median loss of 6.38 with a
    tenth and 5.86 with a quarter; random ones 6.81, the minimum being 5.6.
    """
    return min(math.ceil(0.25 * num_trials), 25)


def _key(space: Space, point: Point) -> tuple[object, ...]:
    return tuple(point.get(key) for key in space.dimensions)
