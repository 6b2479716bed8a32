"""JSON Lines, JSON arrays and CSV files of pairs."""

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from madpo_ray.data import files, strict_json, text_sources
from madpo_ray.data.files import WHOLE
from madpo_ray.data.sources import open_source
from madpo_ray.errors import UserError
from support.pairs import write_jsonl


def test_json_lines(tmp_path: Path) -> None:
    """A line that is not a JSON object becomes a reason."""
    file = write_jsonl(tmp_path / "a.jsonl", ["{no", "[1]", {"a": 1}, {"b": 2}])
    source = open_source(str(file))
    found = list(source.rows())
    assert isinstance(found[0], str)
    assert found[0].startswith("line is not JSON: ")
    assert found[1:] == ["line is not a JSON object", {"a": 1}, {"b": 2}]
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
        (b'{"a"\r\n', "line is not JSON: Expecting ':' delimiter: line 1 column 5"),
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
    monkeypatch.setattr(files, "MAX_LINE_BYTES", 2**20)
    (tmp_path / "a.jsonl").write_bytes(b"x" * (3 * 2**20) + b'\n{"a": 1}\n')
    found = list(open_source(str(tmp_path / "a.jsonl")).rows())
    assert found == ["line is longer than 1 MiB", {"a": 1}]


def test_lines_of_exactly_the_limit_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "MAX_LINE_BYTES", len(b'{"a": 1}\n'))
    (tmp_path / "a.jsonl").write_bytes(b'{"a": 1}\n{"b": 2}\n')
    assert list(open_source(str(tmp_path / "a.jsonl")).rows()) == [{"a": 1}, {"b": 2}]


def test_json_lines_without_a_row(tmp_path: Path) -> None:
    assert open_source(str(write_jsonl(tmp_path / "a.jsonl", ["1", "x"]))).columns() is None


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


def test_lfs_pointers_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("version https://git-lfs.github.com/spec/v1\noid x\n")
    with pytest.raises(UserError, match="is a Git LFS pointer"):
        open_source(str(tmp_path / "a.jsonl")).columns()


def read(path: Path, content: bytes) -> list[Any]:
    """Writes a file and reads its rows."""
    if path.suffix == ".gz":
        content = gzip.compress(content)
    elif path.suffix == ".zst":
        content = pa.compress(content, codec="zstd", asbytes=True)
    path.write_bytes(content)
    return list(open_source(str(path)).rows())


def assert_rows(found: list[Any], expected: list[Any], reason: str) -> None:
    """Rows are equal; a text is how a reason begins; None stands for `reason`."""
    assert len(found) == len(expected)
    for one, own in zip(found, expected, strict=True):
        if isinstance(own, dict):
            assert one == own
        else:
            assert str(one).startswith(own or reason)


@pytest.mark.parametrize("end", ["", ".gz", ".zst"])
def test_compressed_text(end: str, tmp_path: Path) -> None:
    lines = b"".join(b'{"a": %d}\n' % i for i in range(3000))
    expected = [{"a": i} for i in range(3000)]
    assert read(tmp_path / f"a.jsonl{end}", lines) == expected
    array = json.dumps(expected, indent=1).encode()
    assert read(tmp_path / f"a.json{end}", b"\xef\xbb\xbf" + array) == expected
    table = b'a,b\n1,"x\n,y"\n'
    assert read(tmp_path / f"a.csv{end}", table) == [{"a": "1", "b": "x\n,y"}]
    assert open_source(str(tmp_path / f"a.jsonl{end}")).count() >= 3000


@pytest.mark.parametrize("end", [".gz", ".zst"])
def test_torn_compressed_file_is_a_reason(end: str, tmp_path: Path) -> None:
    lines = b"".join(b'{"a": "%d %s"}\n' % (i, bytes(str(i * 7919), "ascii")) for i in range(9000))
    read(tmp_path / f"a.jsonl{end}", lines)
    content = (tmp_path / f"a.jsonl{end}").read_bytes()
    (tmp_path / f"a.jsonl{end}").write_bytes(content[: len(content) // 2])
    *found, reason = open_source(str(tmp_path / f"a.jsonl{end}")).rows()
    assert len(found) < 9000
    assert str(reason).startswith("the rest of the file cannot be read")


def test_name_of_a_compressed_file_must_be_right(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(b'{"a": 1}\n')
    with pytest.raises(UserError, match=r"a\.jsonl\.gz cannot be read"):
        open_source(str(tmp_path / "a.jsonl.gz")).columns()


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=5,
)


@given(st.lists(st.dictionaries(st.text(max_size=3), VALUES, max_size=3)), st.integers(1, 9))
def test_json_array_is_read_in_blocks_of_any_size(
    tmp_path_factory: pytest.TempPathFactory, elements: list[dict[str, Any]], block: int
) -> None:
    file = tmp_path_factory.mktemp("json") / "a.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(strict_json, "READ_BYTES", block)
        for indent in (None, 2):
            content = json.dumps(elements, indent=indent, ensure_ascii=False)
            assert read(file, content.encode("utf-8")) == elements
    assert open_source(str(file)).count() == len(elements)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"[]", []),
        (b" \n[ ] \n", []),
        (b'[{"a": 1}, 2, "x", null, {"b": 1}]', [{"a": 1}, None, None, None, {"b": 1}]),
        (b'[{"a": 1, "a": 2}, {"b": 1}]', ["a key appears twice: 'a'", {"b": 1}]),
        (b'[{"a": 1} {"b": 1}]', [{"a": 1}, "the rest of the file cannot be read"]),
        (b'[{"a": 1}, ]', [{"a": 1}, "the rest of the file cannot be read"]),
        (b'[{"a": 1}, {"b":', [{"a": 1}, "the rest of the file cannot be read"]),
        (b'[{"a": 1}', [{"a": 1}, "the rest of the file cannot be read"]),
        (b'[{"a": 1}, {"b": "\xff"}]', ["the rest of the file cannot be read"]),
        (b'[{"a": 1}]\n[{"a": 2}]', [{"a": 1}, "the rest of the file cannot be read"]),
        (b'[] {"a": 2}', ["the rest of the file cannot be read"]),
        (b"[" * 200_000, ["the rest of the file cannot be read"]),
    ],
)
def test_unusual_arrays(content: bytes, expected: list[Any], tmp_path: Path) -> None:
    """None stands for an element that is no object."""
    assert_rows(read(tmp_path / "a.json", content), expected, "element is not a JSON object")


def test_json_may_be_lines(tmp_path: Path) -> None:
    assert read(tmp_path / "a.json", b'{"a": 1}\n{"a": 2}\n') == [{"a": 1}, {"a": 2}]
    assert open_source(str(tmp_path / "a.json")).columns() == ["a"]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", []),
        (b"a,b\n", []),
        (b"a,b\r\n1,2\r\n\r\n3,4", [{"a": "1", "b": "2"}, {"a": "3", "b": "4"}]),
        (b'a,b\n001,NA\n"",null\n', [{"a": "001", "b": "NA"}, {"a": "", "b": "null"}]),
        (b"a,b\n1\n1,2,3\n4,5\n", [None, None, {"a": "4", "b": "5"}]),
        (b'a,b\n1,"x"y\n', ["the rest of the file cannot be read"]),
        (b'a,b\n1,2\n3,"x\n', [{"a": "1", "b": "2"}, "the rest of the file cannot be read"]),
        (b'a\n"x ""y"" z"\n', [{"a": 'x "y" z'}]),
    ],
)
def test_csv(content: bytes, expected: list[Any], tmp_path: Path) -> None:
    """Every value is text, as it stands there. None stands for a row of another length."""
    reason = "row has not as many fields as the header: "
    assert_rows(read(tmp_path / "a.csv", content), expected, reason)


def test_tsv(tmp_path: Path) -> None:
    assert read(tmp_path / "a.tsv", b"a\tb\n1,2\t3\n") == [{"a": "1,2", "b": "3"}]
    assert open_source(str(tmp_path / "a.tsv")).columns() == ["a", "b"]


def test_csv_with_two_columns_of_one_name_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("a,a\n1,2\n")
    with pytest.raises(UserError, match="has two columns 'a'"):
        open_source(str(tmp_path / "a.csv")).columns()


@pytest.mark.parametrize("piece_bytes", [1, 7, 30, 1000])
@pytest.mark.parametrize(
    "content",
    [
        b'{"a": 1}\n{"a": 2}\n{"a": 3}\n',
        b'\xef\xbb\xbf{"a": 1}\r\n{"a": 2}',
        b'{"a": 1}\n\n\nno json\n{"a": "x' + b"y" * 50 + b'"}\n',
        b"\n",
        b"",
    ],
)
def test_pieces_are_the_file(
    piece_bytes: int, content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each row once, with its number."""
    monkeypatch.setattr(text_sources, "PIECE_BYTES", piece_bytes)
    (tmp_path / "a.jsonl").write_bytes(content)
    source = open_source(str(tmp_path / "a.jsonl"))
    whole = list(enumerate(source.rows()))
    pieces = source.pieces()
    assert [row for one in pieces for row in enumerate(source.rows(one), one.first_row)] == whole
    assert len(pieces) > 1 or piece_bytes > 10 or len(whole) < 2


def test_blank_line_is_no_row_but_a_line(tmp_path: Path) -> None:
    content = b'\n{"a": 1}\n \t\r\n{"a": 2}\n\n'
    assert read(tmp_path / "a.jsonl", content) == [
        files.BLANK,
        {"a": 1},
        files.BLANK,
        {"a": 2},
        files.BLANK,
    ]
    assert open_source(str(tmp_path / "a.jsonl")).columns() == ["a"]


def test_endless_line_is_in_one_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MAX_LINE_BYTES", 16)
    monkeypatch.setattr(text_sources, "PIECE_BYTES", 4)
    (tmp_path / "a.jsonl").write_bytes(b'{"a": 1}\n' + b"x" * 100 + b'\n{"a": 2}\n')
    source = open_source(str(tmp_path / "a.jsonl"))
    found = [row for one in source.pieces() for row in enumerate(source.rows(one), one.first_row)]
    assert found == list(enumerate(source.rows()))
    assert found[2] == (2, {"a": 2})


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.json", "a.csv"])
def test_files_that_cannot_be_cut(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_sources, "PIECE_BYTES", 4)
    (tmp_path / name).write_bytes(gzip.compress(b"x\n" * 10) if name.endswith("gz") else b"x\n" * 9)
    assert open_source(str(tmp_path / name)).pieces() == [WHOLE]
