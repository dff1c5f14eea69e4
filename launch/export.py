"""Merges a run's adapter into its base model: one folder that transformers, vLLM and others load as any model.

    python launch/export.py run=<run folder> out=<new folder>

The merged weights are opened again and must give the adapter's logits.
"""

import sys

from tunesmith.launch.arguments import key_values, main, run_dir_of
from tunesmith.train.errors import ConfigError
from tunesmith.train.paths import user_path


def export(arguments: list[str]) -> None:
    values = key_values(arguments, {"run": "", "out": ""}, (__doc__ or "").split("\n\n", 1)[1])
    run_dir = run_dir_of(values["run"])
    out = user_path(values["out"]).absolute()
    if not values["out"] or out.exists():
        problem = f"{out} is there already." if values["out"] else "no folder to write to."
        raise ConfigError(problem, at="out", do="add out=<a folder that does not exist>.")
    from tunesmith.train.answer.merge import merge

    sys.stdout.write(f"{out}: {merge(run_dir, out)}\n")


if __name__ == "__main__":
    main(export)
