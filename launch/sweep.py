"""Trains many times over a search space, and says which settings are best.

    python launch/sweep.py -m +exp=support_bot optimizer.learning_rate=1e-5,3e-5,1e-4 adapter=lora adapter.r=8,16
    python launch/sweep.py -m +exp=support_bot +sweep=lora hydra.sweeper.n_trials=40
    python launch/sweep.py -m +exp=support_bot hydra/sweeper=optuna 'optimizer.learning_rate=interval(1e-5,1e-3)'

The same command continues a sweep that was stopped or killed; given twice, the two share the trials.

Options:
    -m, --multirun         needed: one training is launch/train.py
    --help                 this text, the search spaces and the settings of the sweeper
    --config-dir <folder>  search your own yaml files too: <folder>/sweep/mine.yaml is +sweep=mine
"""

from tunesmith.launch.arguments import main
from tunesmith.train.errors import ConfigError


def sweep(arguments: list[str]) -> None:
    """Runs the sweep, where its packages are installed."""
    try:
        from tunesmith.launch.sweeping import command
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"a sweep needs {error.name}, which is not installed.",
            at="launch/sweep.py",
            do="pip install -e '.[sweep]'.",
        ) from None
    command.sweep(arguments, __doc__ or "")


if __name__ == "__main__":
    main(sweep)
