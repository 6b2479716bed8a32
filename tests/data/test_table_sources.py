"""Parquet and Arrow files of pairs."""

import datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import feather

from madpo_ray.data.sources import open_source
from madpo_ray.errors import UserError


def test_parquet(tmp_path: Path) -> None:
    rows = [{"a": i, "b": [str(i)]} for i in range(3000)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    source = open_source(str(tmp_path / "a.parquet"))
    assert list(source.rows()) == rows
    assert source.columns() == ["a", "b"]
    assert source.count() == 3000


@pytest.mark.parametrize("suffix", ["parquet", "feather"])
def test_keys_of_other_rows_are_none(suffix: str, tmp_path: Path) -> None:
    """A column has one type: a call has the arguments of all calls."""
    rows = [{"chat": [{"call": {"x": 1}}]}, {"chat": [{"call": {"y": 2}}]}, {"chat": None}]
    table = pa.Table.from_pylist(rows)
    write = {"parquet": pq.write_table, "feather": feather.write_feather}[suffix]
    write(table, tmp_path / f"a.{suffix}")
    assert list(open_source(str(tmp_path / f"a.{suffix}")).rows()) == rows


def test_parquet_value_that_python_lacks(tmp_path: Path) -> None:
    """A date after the year 9999 spoils its own row only."""
    days = pa.array([0, 10**7, 1], pa.int32()).cast(pa.date32())
    pq.write_table(pa.table({"day": days}), tmp_path / "a.parquet")
    first, second, third = open_source(str(tmp_path / "a.parquet")).rows()
    assert first == {"day": datetime.date(1970, 1, 1)}
    assert isinstance(second, str)
    assert second.startswith("a value cannot be read: ")
    assert third == {"day": datetime.date(1970, 1, 2)}


@pytest.mark.parametrize("folder", ["beta=0.1", "split=all"])
def test_paths_are_not_data(folder: str, tmp_path: Path) -> None:
    (tmp_path / folder).mkdir()
    pq.write_table(pa.table({"split": ["train"]}), tmp_path / folder / "a.parquet")
    rows = list(open_source(str(tmp_path / folder / "a.parquet")).rows())
    assert rows == [{"split": "train"}]


def test_refuses_what_is_no_parquet(tmp_path: Path) -> None:
    (tmp_path / "b.parquet").write_text("no")
    with pytest.raises(UserError, match="not a readable Parquet file"):
        open_source(str(tmp_path / "b.parquet")).columns()


def test_refuses_two_columns_of_one_name(tmp_path: Path) -> None:
    table = pa.table([["a"], ["b"]], names=["prompt", "prompt"])
    pq.write_table(table, tmp_path / "two.parquet")
    with pytest.raises(UserError, match="has two columns 'prompt'"):
        open_source(str(tmp_path / "two.parquet")).columns()


def test_damaged_parquet_pages_are_a_reason(tmp_path: Path) -> None:
    """The rows before them are read."""
    file = tmp_path / "a.parquet"
    pq.write_table(pa.table({"prompt": [str(i) for i in range(1000)]}), file, row_group_size=500)
    damaged = bytearray(file.read_bytes())
    start = pq.ParquetFile(file).metadata.row_group(1).column(0).data_page_offset
    damaged[start : start + 40] = b"\xff" * 40
    file.write_bytes(damaged)
    *rows, reason = open_source(str(file)).rows()
    assert isinstance(reason, str)
    assert reason.startswith("the rest of the file cannot be read")
    assert rows == [{"prompt": str(i)} for i in range(len(rows))]


def test_parquet_text_that_is_no_unicode(tmp_path: Path) -> None:
    """Spoils its own row only."""
    texts = pa.array([b"a", b"\xff", b"c"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"t": texts}), tmp_path / "a.parquet")
    first, second, third = open_source(str(tmp_path / "a.parquet")).rows()
    assert (first, third) == ({"t": "a"}, {"t": "c"})
    assert isinstance(second, str)
    assert second.startswith("a value cannot be read")


def test_parquet_maps_are_objects(tmp_path: Path) -> None:
    arguments = pa.array([[("x", "1")]], pa.map_(pa.string(), pa.string()))
    pq.write_table(pa.table({"arguments": arguments}), tmp_path / "a.parquet")
    assert list(open_source(str(tmp_path / "a.parquet")).rows()) == [{"arguments": {"x": "1"}}]


def write_arrow(path: Path, table: pa.Table, *, is_stream: bool) -> None:
    open_writer = pa.ipc.new_stream if is_stream else pa.ipc.new_file
    with open_writer(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)


@pytest.mark.parametrize("is_stream", [True, False])
def test_arrow(is_stream: bool, tmp_path: Path) -> None:
    """Streams, as `datasets` writes them, and files."""
    rows = [{"a": i, "b": [str(i)]} for i in range(5)]
    write_arrow(tmp_path / "a.arrow", pa.Table.from_pylist(rows), is_stream=is_stream)
    source = open_source(str(tmp_path / "a.arrow"))
    assert list(source.rows()) == rows
    assert source.columns() == ["a", "b"]
    assert source.count() == 5


@pytest.mark.parametrize("content", [b"", b"no", b"ARROW1\x00\x00"])
def test_refuses_what_is_no_arrow(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.arrow").write_bytes(content)
    with pytest.raises(UserError, match="not a readable Arrow file"):
        open_source(str(tmp_path / "a.arrow")).columns()


def test_torn_arrow_stream_is_a_reason(tmp_path: Path) -> None:
    file = tmp_path / "a.arrow"
    write_arrow(file, pa.table({"a": list(range(6))}), is_stream=True)
    file.write_bytes(file.read_bytes()[:-40])
    *rows, reason = open_source(str(file)).rows()
    assert rows == [{"a": i} for i in range(len(rows))]
    assert str(reason).startswith("the rest of the file cannot be read")
