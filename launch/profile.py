"""Records some steps of a training and says what would make them faster: a page, a trace, a short list.

    python launch/profile.py +exp=support_bot key=value ...
    deepspeed launch/profile.py ...          or torchrun, srun, as launch/train.py

Trains ten steps and records three (profile.start_step, profile.num_steps); nothing is evaluated, saved or sent. The run
folder holds profile/profile.html and profile/trace.json.gz, for ui.perfetto.dev.

Options:
    --help                 this text
    --config-dir <folder>  search your own yaml files too
"""

import importlib.util
import sys
import sysconfig
from pathlib import Path

if __name__ == "profile":
    # A script of launch/ has this folder first on the path, and cProfile means the standard library's profile.
    spec = importlib.util.spec_from_file_location("profile", Path(sysconfig.get_path("stdlib")) / "profile.py")
    assert spec is not None
    assert spec.loader is not None
    sys.modules["profile"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["profile"])

from tunesmith.launch.arguments import main, show_help, take_option
from tunesmith.train.errors import ConfigError
from tunesmith.train.ranks.stop import stop_request

# What a training does besides its steps.
LEFT_OUT = (
    *("checkpoint.every_steps=null", "checkpoint.every_minutes=null", "checkpoint.at_end=false", "resume=never"),
    *("evaluate.every_steps=null", "evaluate.patience=null", "optimizer.on_spike=warn", "track.wandb=disabled"),
)


def profile(arguments: list[str]) -> None:
    """Composes and checks the config before anything heavy is imported, then runs."""
    if show_help(arguments, __doc__):
        return
    config_dir, overrides = take_option(arguments, "--config-dir")
    from tunesmith.train.config.compose import compose_config
    from tunesmith.train.paths import user_path

    first = [] if any(override.startswith("profile=") for override in overrides) else ["profile=on"]
    composed = compose_config([*first, *overrides, *LEFT_OUT], None if config_dir is None else user_path(config_dir))
    if composed.config.profile.start_step is None:
        raise ConfigError("no step would be recorded.", at="profile.start_step", do="leave profile=... out.")
    composed.config.name = composed.resolved["name"] = f"{composed.config.name}-profile"
    from tunesmith.train.run.run import run

    with stop_request.listening(), composed.errors_located():
        run(composed, only_profile=True)


if __name__ == "__main__":
    main(profile)
