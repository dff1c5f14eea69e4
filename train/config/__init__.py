"""A run's settings: yaml and command line composed by Hydra into dataclasses that check themselves.

Seam: compose_config(overrides) -> Composed, whose .config is a Config; schema/ has a file for each group of conf/.
Imports torch nowhere: a wrong key costs a fraction of a second. Of train/ it may import errors, paths and redact.
"""
