"""Files written completely or not at all."""

from pathlib import Path

import pytest

from madpo_ray.atomic import write_json, write_text


def test_replaces_a_file(tmp_path: Path) -> None:
    write_text(tmp_path / "a.txt", "old")
    write_text(tmp_path / "a.txt", "new \u00e9")
    assert (tmp_path / "a.txt").read_text(encoding="utf-8") == "new \u00e9"
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_refuses_what_json_lacks(value: float, tmp_path: Path) -> None:
    """And keeps the old file."""
    write_json(tmp_path / "a.json", {"a": 1.0})
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "a.json", {"a": value})
    assert (tmp_path / "a.json").read_text() == '{\n  "a": 1.0\n}\n'
