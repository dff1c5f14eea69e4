"""The folder of configs that ships with Tunesmith; a name that starts with conf:// lies in it."""

import os
from pathlib import Path

CONF_SCHEME = "conf://"
CONF_DIR = Path(__file__).resolve().parents[1] / "conf"


def resolve_path(name: str) -> str:
    """The path that conf://<path> or ~/<path> stands for; any other name unchanged, whether it exists or not."""
    if not name.startswith(CONF_SCHEME):
        return os.path.expanduser(name)
    return str(CONF_DIR / name.removeprefix(CONF_SCHEME))


def user_path(text: str) -> Path:
    """A path that a person wrote, with ~ as the home folder; ~x where nobody is called x is a name as any other."""
    return Path(os.path.expanduser(text))
