"""Files of pairs: what is read, and what is refused by name."""

import datetime
import gzip
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from madpo_ray.data import sources
from madpo_ray.data.sources import KINDS, open_source
from madpo_ray.errors import UserError
from support.pairs import write_jsonl


def test_json_lines(tmp_path: Path) -> None:
    """A line that is not a JSON object becomes a reason."""
    file = write_jsonl(tmp_path / "a.jsonl", ["{no", "[1]", {"a": 1}, {"b": 2}])
    source = open_source(str(file))
    rows = list(source.rows())
    assert isinstance(rows[0], str)
    assert rows[0].startswith("line is not JSON: ")
    assert rows[1:] == ["line is not a JSON object", {"a": 1}, {"b": 2}]
    assert source.columns() == ["a", "b"]
    assert source.count() == 4


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b'{"a": 1}\r\n', {"a": 1}),
        (b'{"a": "\\u2028"}\n', {"a": "\u2028"}),
        (b'{"a": 1, "a": 2}\n', "a key appears twice: 'a'"),
        (b'{"m": {"b": 1, "b": 1}}\n', "a key appears twice: 'b'"),
        (b"[" * 200_000 + b"\n", "line is not JSON"),
        (b'{"a": "\xe4"}\n', "line is not JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}\n", "line is not JSON"),
    ],
)
def test_unusual_lines(line: bytes, expected: object, tmp_path: Path) -> None:
    """Each is read, or has a reason; the line after it is read."""
    (tmp_path / "a.jsonl").write_bytes(line + b'{"z": 1}\n')
    first, second = open_source(str(tmp_path / "a.jsonl")).rows()
    assert second == {"z": 1}
    if isinstance(expected, str):
        assert isinstance(first, str)
        assert first.startswith(expected)
    else:
        assert first == expected


def test_byte_order_mark_is_skipped(tmp_path: Path) -> None:
    """At the beginning of the file only."""
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"a": 1}\n{"a": 2}\n')
    assert list(open_source(str(tmp_path / "a.jsonl")).rows()) == [{"a": 1}, {"a": 2}]


def test_endless_line_is_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "MAX_LINE_BYTES", 2**20)
    (tmp_path / "a.jsonl").write_bytes(b"x" * (3 * 2**20) + b'\n{"a": 1}\n')
    rows = list(open_source(str(tmp_path / "a.jsonl")).rows())
    assert rows == ["line is longer than 1 MiB", {"a": 1}]


def test_json_lines_without_a_row(tmp_path: Path) -> None:
    assert open_source(str(write_jsonl(tmp_path / "a.jsonl", ["1", "x"]))).columns() is None


def test_parquet(tmp_path: Path) -> None:
    rows = [{"a": i, "b": [str(i)]} for i in range(3000)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    source = open_source(str(tmp_path / "a.parquet"))
    assert list(source.rows()) == rows
    assert source.columns() == ["a", "b"]
    assert source.count() == 3000


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


def test_suffixes_are_unique() -> None:
    suffixes = [suffix for kind in KINDS for suffix in kind.suffixes]
    assert len(suffixes) == len(set(suffixes))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none.jsonl", "does not exist"),
        ("*.jsonl", "patterns are not expanded"),
        ("folder", "is a folder: list its .parquet or .jsonl files"),
        ("a.txt", r"must end in \.parquet or \.jsonl"),
    ],
)
def test_refuses_what_is_no_source(name: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(UserError, match=message):
        open_source(str(tmp_path / name))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'[{"a": 1}]', "is a JSON array, not JSON Lines"),
        (b'\xef\xbb\xbf\n  [\n{"a": 1}]', "is a JSON array, not JSON Lines"),
        (gzip.compress(b'{"a": 1}\n'), "compressed with gzip"),
        (b"\x28\xb5\x2f\xfd\x00", "compressed with zstd"),
        ('{"a": 1}\n'.encode("utf-16"), "UTF-16 text"),
        (b"\xfe\xff" + '{"a": 1}\n'.encode("utf-16-be"), "UTF-16 text"),
        (b"PAR1", "is a Parquet file: name it .parquet"),
    ],
)
def test_refuses_other_files_named_jsonl(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=message):
        open_source(str(tmp_path / "a.jsonl")).columns()


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


def test_lines_of_exactly_the_limit_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "MAX_LINE_BYTES", len(b'{"a": 1}\n'))
    (tmp_path / "a.jsonl").write_bytes(b'{"a": 1}\n{"b": 2}\n')
    assert list(open_source(str(tmp_path / "a.jsonl")).rows()) == [{"a": 1}, {"b": 2}]


def test_parquet_text_that_is_no_unicode(tmp_path: Path) -> None:
    """Spoils its own row only."""
    texts = pa.array([b"a", b"\xff", b"c"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"t": texts}), tmp_path / "a.parquet")
    first, second, third = open_source(str(tmp_path / "a.parquet")).rows()
    assert (first, third) == ({"t": "a"}, {"t": "c"})
    assert isinstance(second, str)
    assert second.startswith("a value cannot be read")


def test_lfs_pointers_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("version https://git-lfs.github.com/spec/v1\noid x\n")
    with pytest.raises(UserError, match="is a Git LFS pointer"):
        open_source(str(tmp_path / "a.jsonl")).columns()


def test_parquet_maps_are_objects(tmp_path: Path) -> None:
    arguments = pa.array([[("x", "1")]], pa.map_(pa.string(), pa.string()))
    pq.write_table(pa.table({"arguments": arguments}), tmp_path / "a.parquet")
    assert list(open_source(str(tmp_path / "a.parquet")).rows()) == [{"arguments": {"x": "1"}}]


def test_limits_are_what_the_messages_say() -> None:
    assert (sources.MAX_LINE_BYTES, sources.ROWS_PER_BATCH) == (64 * 2**20, 1024)
