"""With what a rank ends that raised."""

import os

import pytest
import torch.distributed as dist

from tunesmith.train.errors import ConfigError, TrainingError, TunesmithError
from tunesmith.train.ranks.distributed import World
from tunesmith.train.ranks.phases import Phase
from tunesmith.train.ranks.progress import reach
from tunesmith.train.watch.timeouts import Timeouts
from tunesmith.train.watch.watchdog import Watchdog


@pytest.mark.parametrize(
    ("phases", "error", "code"),
    [
        ([(Phase.loading_model, 0)], ConfigError("it is wrong."), 2),
        ([(Phase.resuming, 400)], TrainingError("it does not fit."), 2),
        ([(Phase.reading_data, 0)], TrainingError("it is not finite."), 1),
        ([(Phase.reading_data, 400), (Phase.forward, 400), (Phase.saving, 402)], TrainingError("the disk is full."), 1),
        ([(Phase.reading_data, 0), (Phase.finishing, 1)], ConfigError("too late."), 1),
        ([(Phase.loading_model, 0)], RuntimeError("a bug"), 1),
    ],
)
def test_a_mistake_of_the_user_is_2_until_the_first_step_begins_and_then_it_may_be_tried_again(
    phases: list[tuple[Phase, int]], error: Exception, code: int, capfd: pytest.CaptureFixture[str]
) -> None:
    pid = os.fork()  # the rank ends in it, as it does in a run
    if pid == 0:
        try:
            watchdog = Watchdog(World(), Timeouts(60, 60, 60), dist.HashStore(), lambda line: None)
            for phase, step in phases:
                reach(phase, step)
            try:
                raise error
            except Exception as raised:
                watchdog.fail(raised)
        finally:
            os._exit(99)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == code
    said = capfd.readouterr().err
    assert str(error) in said
    assert ("Traceback" in said) is not isinstance(error, TunesmithError)
