"""Rows as Parquet files, in order."""

import json
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from madpo_ray.artifacts.building import building
from madpo_ray.artifacts.manifest import Inputs
from madpo_ray.artifacts.tables import (
    column_names,
    count_rows,
    read_columns,
    read_split,
    read_split_contiguous,
    rows_folder,
    write_table,
    write_with_columns,
)


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Seven rows in three files."""
    folder = tmp_path / "data"
    folder.mkdir()
    for number, (start, stop) in enumerate([(0, 3), (3, 4), (4, 7)]):
        table = pa.table(
            {
                "pair_id": [f"pair-{i}" for i in range(start, stop)],
                "split": ["test" if i % 2 else "train" for i in range(start, stop)],
                "ids": pa.array([[i] * i for i in range(start, stop)], pa.list_(pa.int32())),
            }
        )
        pq.write_table(table, folder / f"part-{number:06}.parquet")
    return folder


def test_reads_a_split_in_order(rows: Path) -> None:
    assert read_split(rows, "test", ["ids"])["ids"].to_pylist() == [[1], [3] * 3, [5] * 5]
    assert count_rows(rows) == 7
    assert column_names(rows) == ["pair_id", "split", "ids"]


def test_contiguous_columns_are_one_piece(rows: Path) -> None:
    table = read_split_contiguous(rows, "train", ["pair_id", "ids"])
    assert table["ids"].num_chunks == 1
    assert table["ids"].type == pa.large_list(pa.int32())
    assert table["ids"].to_pylist() == [[], [2] * 2, [4] * 4, [6] * 6]


def test_adds_columns_row_by_row(rows: Path, tmp_path: Path) -> None:
    ids = [f"pair-{i}" for i in range(7)]
    added = pa.table({"pair_id": ids, "margin": [i / 2 for i in range(7)]})
    write_with_columns(rows, added, tmp_path / "out")
    result = read_columns(tmp_path / "out", ["pair_id", "ids", "margin"])
    assert result["pair_id"].to_pylist() == ids
    assert result["margin"].to_pylist() == [i / 2 for i in range(7)]
    assert len(list((tmp_path / "out").iterdir())) == 3


def test_copies_only_rows_to_keep(rows: Path, tmp_path: Path) -> None:
    """A file may be left with none."""
    ids = [f"pair-{i}" for i in range(7)]
    added = pa.table({"pair_id": ids, "margin": [i / 2 for i in range(7)]})
    keep = pa.chunked_array([[True, False, True, False, False, True, True]])
    write_with_columns(rows, added, tmp_path / "out", keep=keep)
    result = read_columns(tmp_path / "out", ["pair_id", "margin"])
    assert result["pair_id"].to_pylist() == [ids[i] for i in (0, 2, 5, 6)]
    assert result["margin"].to_pylist() == [0.0, 1.0, 2.5, 3.0]


@pytest.mark.parametrize(
    ("rows_per_file", "sizes"), [(1, [1] * 7), (2, [2, 2, 2, 1]), (7, [7]), (100, [7])]
)
def test_files_have_the_wanted_number_of_rows(
    rows_per_file: int, sizes: list[int], rows: Path, tmp_path: Path
) -> None:
    ids = [f"pair-{i}" for i in range(7)]
    added = pa.table({"pair_id": ids, "margin": [0.5] * 7})
    write_with_columns(rows, added, tmp_path / "out", rows_per_file=rows_per_file)
    files = sorted((tmp_path / "out").iterdir())
    assert [pq.read_metadata(file).num_rows for file in files] == sizes
    assert read_columns(tmp_path / "out", ["pair_id"])["pair_id"].to_pylist() == ids


def test_files_of_nothing(rows: Path, tmp_path: Path) -> None:
    """There is one, which has the columns."""
    added = pa.table({"pair_id": [f"pair-{i}" for i in range(7)], "margin": [0.5] * 7})
    keep = pa.chunked_array([[False] * 7])
    write_with_columns(rows, added, tmp_path / "out", keep=keep, rows_per_file=2)
    assert count_rows(tmp_path / "out") == 0
    assert column_names(tmp_path / "out") == ["pair_id", "split", "ids", "margin"]


def test_metadata_is_in_every_file(rows: Path, tmp_path: Path) -> None:
    added = pa.table({"pair_id": [f"pair-{i}" for i in range(7)]})
    origin = {"model": "a", "max_length": 64}
    write_with_columns(rows, added, tmp_path / "out", metadata=origin)
    for file in (tmp_path / "out").iterdir():
        assert json.loads(pq.read_schema(file).metadata[b"madpo_ray"]) == origin


@pytest.mark.parametrize("ids", [[6, 5, 4, 3, 2, 1, 0], list(range(8)), list(range(6))])
def test_refuses_columns_of_other_rows(ids: list[int], rows: Path, tmp_path: Path) -> None:
    added = pa.table({"pair_id": [f"pair-{i}" for i in ids], "margin": [0.0] * len(ids)})
    with pytest.raises(RuntimeError):
        write_with_columns(rows, added, tmp_path / "out")


def test_writes_a_table(tmp_path: Path) -> None:
    write_table(pa.table({"a": [1, 2]}), tmp_path / "data")
    assert read_columns(tmp_path / "data", ["a"])["a"].to_pylist() == [1, 2]


def test_copied_file_is_no_row(tmp_path: Path) -> None:
    """A finished artifact's files are those of its manifest."""
    table = pa.table({"pair_id": ["a", "b"], "split": ["train", "train"]})
    with building(tmp_path / "pairs", Inputs("pairs")) as (partial, _):
        write_table(table, rows_folder(partial))
        assert count_rows(rows_folder(partial)) == 2
    rows = rows_folder(tmp_path / "pairs")
    shutil.copy(rows / "part-000000.parquet", rows / "part-000000 (copy).parquet")
    (rows / "._part-000000.parquet").write_bytes(b"")
    assert count_rows(rows) == 2
