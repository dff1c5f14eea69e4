"""Texts in Hydra's grammar of overrides."""


def quoted(text: str) -> str:
    """A value that Hydra reads as this text, whatever characters it has."""
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"
