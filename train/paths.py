"""Where things are: names that start with conf:// lie in the folder of configs that ships with Tunesmith."""

from pathlib import Path

CONF_SCHEME = "conf://"
CONF_FOLDER = Path(__file__).resolve().parents[1] / "conf"


def resolve_path(name: str) -> str:
    """The path that conf://<path> stands for; any other name unchanged. Says nothing about whether it exists."""
    if not name.startswith(CONF_SCHEME):
        return name
    return str(CONF_FOLDER / name.removeprefix(CONF_SCHEME))
