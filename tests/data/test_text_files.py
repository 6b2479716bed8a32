"""Rows of texts, read by number from flat files."""

from pathlib import Path

import pyarrow as pa
import pytest

from madpo_ray.artifacts.tables import write_table
from madpo_ray.data.text_files import TextFiles

NAMES = ("prompt", "chosen")
# Row i of the split is row 2 i of all; lengths in bytes are not those in characters.
ROWS = [{"prompt": "né" * (i % 3), "chosen": f"\u4f60{i}\n\0"} for i in range(9)]
EXPECTED = [[ROWS[2 * i][name] for name in NAMES] for i in (4, 0, 3, 1, 2)]


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    splits = ["test" if i % 2 else "train" for i in range(len(ROWS))]
    columns = {name: [row[name] for row in ROWS] for name in NAMES}
    write_table(pa.table({"split": splits, **columns}), tmp_path / "data")
    return tmp_path / "data"


def contents(folder: Path, rows: Path) -> list[list[str]]:
    files = TextFiles(folder, rows, "train", NAMES)
    found = [files.read(i) for i in (4, 0, 3, 1, 2)]
    files.close()
    return found


def test_reads_rows_of_the_split_by_number(rows: Path, tmp_path: Path) -> None:
    assert contents(tmp_path / "texts", rows) == EXPECTED


def test_files_are_made_once(rows: Path, tmp_path: Path) -> None:
    contents(tmp_path / "texts", rows)
    times = [path.stat().st_mtime_ns for path in (tmp_path / "texts").iterdir()]
    contents(tmp_path / "texts", rows)
    assert [path.stat().st_mtime_ns for path in (tmp_path / "texts").iterdir()] == times


@pytest.mark.parametrize("name", ["chosen", "chosen.ends"])
@pytest.mark.parametrize("content", [b"", b"torn    "])
def test_torn_file_is_made_again(name: str, content: bytes, rows: Path, tmp_path: Path) -> None:
    contents(tmp_path / "texts", rows)
    (tmp_path / "texts" / name).write_bytes(content)
    assert contents(tmp_path / "texts", rows) == EXPECTED


def test_no_columns(tmp_path: Path) -> None:
    """Nothing is read, and no folder is made."""
    assert TextFiles(tmp_path / "texts", tmp_path / "none", "train", ()).read(0) == []
    assert not (tmp_path / "texts").exists()
