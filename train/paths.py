"""The folder of configs that ships with Tunesmith; a name that starts with conf:// lies in it."""

from pathlib import Path

CONF_SCHEME = "conf://"
CONF_DIR = Path(__file__).resolve().parents[1] / "conf"


def resolve_path(name: str) -> str:
    """The path that conf://<path> stands for; any other name unchanged. Says nothing about whether it exists."""
    if not name.startswith(CONF_SCHEME):
        return name
    return str(CONF_DIR / name.removeprefix(CONF_SCHEME))
