"""Rows of tokens and texts, read by number from flat files."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from madpo_ray.artifacts.tables import write_table
from madpo_ray.data.flat_files import TextFiles, TokenFiles

NAMES = ("prompt_ids", "chosen_ids")
# Row i of the split is row 2 i of all.
ROWS = [{"prompt_ids": [i] * (i % 3 + 1), "chosen_ids": [10 * i, 10 * i + 1]} for i in range(9)]
TRAIN_ROWS = ROWS[::2]
LENGTHS = np.array([[len(row[name]) for name in NAMES] for row in TRAIN_ROWS])


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    splits = ["test" if i % 2 else "train" for i in range(len(ROWS))]
    columns = {name: pa.array([row[name] for row in ROWS], pa.list_(pa.int32())) for name in NAMES}
    write_table(pa.table({"split": splits, **columns}), tmp_path / "data")
    return tmp_path / "data"


def contents(files: TokenFiles) -> list[list[list[int]]]:
    return [[part.tolist() for part in files.read(i)] for i in (4, 0, 3, 1, 2)]


EXPECTED = [[TRAIN_ROWS[i][name] for name in NAMES] for i in (4, 0, 3, 1, 2)]


def test_reads_rows_of_the_split_by_number(rows: Path, tmp_path: Path) -> None:
    files = TokenFiles(tmp_path / "tokens", rows, "train", NAMES, LENGTHS)
    assert contents(files) == EXPECTED
    files.close()
    assert sorted(path.name for path in (tmp_path / "tokens").iterdir()) == sorted(NAMES)


def test_files_are_made_once(rows: Path, tmp_path: Path) -> None:
    TokenFiles(tmp_path / "tokens", rows, "train", NAMES, LENGTHS).close()
    times = [path.stat().st_mtime_ns for path in (tmp_path / "tokens").iterdir()]
    TokenFiles(tmp_path / "tokens", rows, "train", NAMES, LENGTHS).close()
    assert [path.stat().st_mtime_ns for path in (tmp_path / "tokens").iterdir()] == times


def test_torn_file_is_made_again(rows: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tokens"
    TokenFiles(folder, rows, "train", NAMES, LENGTHS).close()
    (folder / NAMES[1]).write_bytes(b"torn")
    assert contents(TokenFiles(folder, rows, "train", NAMES, LENGTHS)) == EXPECTED


def test_rows_without_tokens_in_a_column(tmp_path: Path) -> None:
    table = pa.table({"split": ["train"], "prompt_ids": pa.array([[]], pa.list_(pa.int32()))})
    write_table(table, tmp_path / "data")
    files = TokenFiles(tmp_path / "t", tmp_path / "data", "train", NAMES[:1], np.array([[0]]))
    assert files.read(0)[0].tolist() == []


TEXTS = ("prompt", "chosen")
# Row i of the split is row 2 i of all; lengths in bytes are not those in characters.
TEXT_ROWS = [{"prompt": "né" * (i % 3), "chosen": f"\u4f60{i}\n\0"} for i in range(9)]
EXPECTED_TEXTS = [[TEXT_ROWS[2 * i][name] for name in TEXTS] for i in (4, 0, 3, 1, 2)]


@pytest.fixture
def text_rows(tmp_path: Path) -> Path:
    splits = ["test" if i % 2 else "train" for i in range(len(TEXT_ROWS))]
    columns = {name: [row[name] for row in TEXT_ROWS] for name in TEXTS}
    write_table(pa.table({"split": splits, **columns}), tmp_path / "data")
    return tmp_path / "data"


def texts_of(folder: Path, text_rows: Path) -> list[list[str]]:
    files = TextFiles(folder, text_rows, "train", TEXTS)
    found = [files.read(i) for i in (4, 0, 3, 1, 2)]
    files.close()
    return found


def test_reads_texts_by_number(text_rows: Path, tmp_path: Path) -> None:
    assert texts_of(tmp_path / "texts", text_rows) == EXPECTED_TEXTS


def test_text_files_are_made_once(text_rows: Path, tmp_path: Path) -> None:
    texts_of(tmp_path / "texts", text_rows)
    times = [path.stat().st_mtime_ns for path in (tmp_path / "texts").iterdir()]
    texts_of(tmp_path / "texts", text_rows)
    assert [path.stat().st_mtime_ns for path in (tmp_path / "texts").iterdir()] == times


@pytest.mark.parametrize("name", ["chosen", "chosen.ends"])
@pytest.mark.parametrize("content", [b"", b"torn    "])
def test_torn_text_file_is_made_again(
    name: str, content: bytes, text_rows: Path, tmp_path: Path
) -> None:
    texts_of(tmp_path / "texts", text_rows)
    (tmp_path / "texts" / name).write_bytes(content)
    assert texts_of(tmp_path / "texts", text_rows) == EXPECTED_TEXTS


def test_no_text_columns(tmp_path: Path) -> None:
    """Nothing is read, and no folder is made."""
    assert TextFiles(tmp_path / "texts", tmp_path / "none", "train", ()).read(0) == []
    assert not (tmp_path / "texts").exists()
