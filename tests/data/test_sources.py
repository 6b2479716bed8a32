"""Files of pairs: what is read, and what is refused by name."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from madpo_ray.config import DataConfig
from madpo_ray.data.sources import KINDS, open_source
from madpo_ray.errors import UserError
from madpo_ray.stages.pairs import check_files
from support.pairs import write_jsonl


def test_json_lines(tmp_path: Path) -> None:
    """A line that is not a JSON object becomes a reason."""
    file = write_jsonl(tmp_path / "a.jsonl", ["{no", "[1]", {"a": 1}, {"b": 2}])
    source = open_source(str(file))
    rows = list(source.rows())
    assert isinstance(rows[0], str)
    assert "not JSON" in rows[0]
    assert rows[1:] == ["line is not a JSON object", {"a": 1}, {"b": 2}]
    assert source.columns() == ["a"]
    assert source.count() == 4


def test_json_lines_without_a_row(tmp_path: Path) -> None:
    assert open_source(str(write_jsonl(tmp_path / "a.jsonl", ["[1]"]))).columns() is None


def test_parquet(tmp_path: Path) -> None:
    rows = [{"a": i, "b": [str(i)]} for i in range(3000)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    source = open_source(str(tmp_path / "a.parquet"))
    assert list(source.rows()) == rows
    assert source.columns() == ["a", "b"]
    assert source.count() == 3000


def test_suffixes_are_unique() -> None:
    suffixes = [suffix for kind in KINDS for suffix in kind.suffixes]
    assert len(suffixes) == len(set(suffixes))


def test_missing_files_and_columns_are_named(tmp_path: Path) -> None:
    rows = [{"prompt": "p", "chosen": "a", "rejekted": "b"}]
    file = write_jsonl(tmp_path / "a.jsonl", rows)
    with pytest.raises(UserError, match="no column 'rejected'; did you mean 'rejekted'"):
        check_files(DataConfig(files=(str(file),)))
    with pytest.raises(UserError, match="does not exist"):
        check_files(DataConfig(files=("/none.jsonl",)))
    with pytest.raises(UserError, match=r"must end in \.parquet or \.jsonl"):
        check_files(DataConfig(files=(__file__,)))
    (tmp_path / "b.parquet").write_text("no")
    with pytest.raises(UserError, match="not a Parquet file"):
        check_files(DataConfig(files=(str(tmp_path / "b.parquet"),)))
