from dataclasses import dataclass
from pathlib import Path

import pytest

from tunesmith.launch import config_docs
from tunesmith.train.config.tree import schema_keys
from tunesmith.train.errors import ConfigError
from tunesmith.train.paths import CONF_DIR


def test_the_page_is_not_stale() -> None:
    config_docs.write(["--check"])


def test_a_stale_page_is_refused_and_can_be_written_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config_docs, "PAGE", tmp_path / "docs/config.md")
    with pytest.raises(ConfigError, match="stale") as caught:
        config_docs.write(["--check"])
    assert "python -m tunesmith.launch.config_docs" in (caught.value.do or "")
    config_docs.write([])
    config_docs.write(["--check"])
    (tmp_path / "docs/config.md").write_text("old")
    with pytest.raises(ConfigError, match="stale"):
        config_docs.write(["--check"])


def test_every_setting_has_a_row_with_a_meaning() -> None:
    rows = {line.split("`")[1]: line for line in config_docs.page().splitlines() if line.startswith("| `")}
    groups = {key.split(".")[0] for key in schema_keys() if "." in key}
    for key in schema_keys():
        if key not in groups:
            takes, default, meaning = (cell.strip() for cell in rows[key].split(" | ")[1:4])
            assert takes, key
            assert default.startswith(("`", "**needed**")), key
            assert len(meaning.removesuffix("|").strip()) > 5, f"{key} has no comment beside it in the schema"


def test_every_option_has_a_row_with_a_meaning() -> None:
    page = config_docs.page()
    for path in CONF_DIR.glob("*/*.yaml"):
        added = path.parent.name in ("exp", "sweep")
        name = f"{'+' if added else ''}{path.parent.name}={path.stem}"
        row = next(line for line in page.splitlines() if line.startswith(f"| `{name}`"))
        assert len(row.split(" | ")[1]) > 10, f"{path} has no comment"


def test_no_cell_is_broken_by_a_bar_or_swallowed_as_a_tag() -> None:
    for line in config_docs.page().splitlines():
        if line.startswith("| `"):
            assert line.replace("\\|", "").count("|") in (3, 5)
            assert "<" not in line.split(" | ", 1)[1].replace("`", "")


@dataclass
class Sizes:
    long: (
        int | None  # a type of several lines
    ) = None
    short: int = 1  # one line


def test_a_comment_beside_a_field_of_several_lines_is_found() -> None:
    assert config_docs.field_comments(Sizes) == {"long": "a type of several lines", "short": "one line"}
