"""Fine-tunes a model.

    deepspeed launch/train.py +exp=support_bot key=value ...      all GPUs of this machine
    deepspeed --num_gpus 2 launch/train.py ...                    two ranks (also without a GPU)
    torchrun --nproc_per_node 2 launch/train.py ...
    srun python launch/train.py ...
    python launch/train.py ...                                    one process

Options:
    --help                 this text, the groups and their options
    --cfg                  print the composed config and end
    --config-dir <folder>  search your own yaml files too: <folder>/exp/my_bot.yaml is +exp=my_bot
"""

import sys
from pathlib import Path

from tunesmith.launch import start_file
from tunesmith.launch.arguments import main, take_option
from tunesmith.train.errors import ConfigError
from tunesmith.train.ranks.stop import stop_request


def train(arguments: list[str]) -> None:
    """Trains, or stops when it is asked to: from here on a signal saves what there is to save."""
    with stop_request.listening():
        compose_and_train(arguments)


def compose_and_train(arguments: list[str]) -> None:
    """Composes and checks the config before anything heavy is imported, then runs."""
    start, arguments = take_option(arguments, "--start")
    if start is not None:  # by launch/hosts.py; first, as libraries read variables while they are imported
        arguments = start_file.take(start_file.from_word(start))
    from tunesmith.train.config.compose import compose_config
    from tunesmith.train.paths import CONF_DIR, user_path

    config_dir, overrides = take_option(arguments, "--config-dir")
    own = None if config_dir is None else user_path(config_dir)
    if {"-h", "--help"} & set(overrides):
        folders = [CONF_DIR, *([own] if own and own.is_dir() else [])]
        sys.stdout.write(f"{__doc__}\n{groups(folders)}\nEvery setting: docs/config.md\n")
        return
    if {"-m", "--multirun"} & set(overrides):
        raise ConfigError(
            "a sweep cannot run inside the ranks of one training.", at="--multirun", do="use launch/sweep.py -m."
        )
    show = "--cfg" in overrides
    composed = compose_config([item for item in overrides if item != "--cfg"], own)
    if show:
        import yaml

        from tunesmith.train.redact import redact

        sys.stdout.write(yaml.safe_dump(redact(composed.resolved), sort_keys=False))
        return
    from tunesmith.train.run.run import run

    with composed.errors_located():
        run(composed)


def groups(folders: list[Path]) -> str:
    """The config groups and their options, a line each."""
    from tunesmith.train.config.compose import group_options

    names = sorted({path.name for folder in folders for path in folder.iterdir() if path.is_dir()})
    rows = [(name, group_options(name, folders)) for name in names]
    return "\n".join(f"{name:<11} {' | '.join(options)}" for name, options in rows if options)


if __name__ == "__main__":
    main(train)
