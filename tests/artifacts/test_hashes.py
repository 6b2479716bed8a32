"""Sizes and hashes of files."""

import os
from pathlib import Path

import pytest

from madpo_ray.artifacts.hashes import damaged_files, describe_files, hash_file
from madpo_ray.atomic import write_text


def test_hash_follows_an_edit_of_equal_size(tmp_path: Path) -> None:
    """The cache looks at the time of change, too."""
    file = tmp_path / "a.txt"
    file.write_text("one")
    before = hash_file(file)
    time = file.stat().st_mtime_ns
    write_text(file, "two")
    os.utime(file, ns=(time + 1, time + 1))
    assert hash_file(file) != before
    assert describe_files(tmp_path).keys() == {"a.txt"}


@pytest.mark.parametrize(
    ("text", "by_size", "by_hash"),
    [
        ("one", [], []),
        ("two", [], ["a/b.txt has different content"]),
        ("three", ["a/b.txt has 5 bytes instead of 3"], ["a/b.txt has 5 bytes instead of 3"]),
        (None, ["a/b.txt is missing"], ["a/b.txt is missing"]),
    ],
)
def test_damage_is_named(
    text: str | None, by_size: list[str], by_hash: list[str], tmp_path: Path
) -> None:
    file = tmp_path / "a" / "b.txt"
    file.parent.mkdir()
    write_text(file, "one")
    files = describe_files(tmp_path)
    file.unlink()
    if text is not None:
        write_text(file, text)
        time = file.stat().st_mtime_ns
        os.utime(file, ns=(time + 1, time + 1))
    assert damaged_files(tmp_path, files) == by_size
    assert damaged_files(tmp_path, files, compare_hashes=True) == by_hash


def test_unreadable_file_is_damaged(tmp_path: Path) -> None:
    """A folder in its place, or an entry without a size."""
    (tmp_path / "a.txt").write_text("x")
    files = describe_files(tmp_path)
    assert damaged_files(tmp_path, {"a.txt": {}}) == ["a.txt has no size in the manifest"]
    (tmp_path / "a.txt").unlink()
    (tmp_path / "a.txt").symlink_to("a.txt")
    assert damaged_files(tmp_path, files) == [
        "a.txt cannot be read (Too many levels of symbolic links)"
    ]


def test_bit_rot_is_found(tmp_path: Path) -> None:
    """In a file that this process has hashed: neither its size nor its time changes."""
    file = tmp_path / "a.txt"
    write_text(file, "one")
    files = describe_files(tmp_path)
    time = file.stat().st_mtime_ns
    file.write_text("two")
    os.utime(file, ns=(time, time))
    assert damaged_files(tmp_path, files, compare_hashes=True) == ["a.txt has different content"]
