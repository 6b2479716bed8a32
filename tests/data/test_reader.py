"""Rows of a file become checked pairs or rejects."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from madpo_ray.config import DataConfig
from madpo_ray.data.reader import PairReader
from support.pairs import make_rows, messages, write_jsonl

ROW = {"prompt": "the film", "chosen": " is good", "rejected": " is bad", "score": 1.5}


def reader(tokenizer: Any, is_conversational: bool = False, **changes: Any) -> PairReader:
    data = DataConfig(files=("x",), **changes)
    return PairReader(data, tokenizer, seed=0, is_conversational=is_conversational)


def test_reads_a_pair(tokenizer: Any) -> None:
    pair = reader(tokenizer, keep_columns=("score",)).read(ROW)
    assert pair["prompt"] == "the film"
    assert pair["group"] == '"the film"'
    assert pair["split"] in ("train", "validation", "test")
    assert pair["score"] == 1.5
    assert pair["chosen_ids"][-1] == tokenizer.eos_token_id


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("line is not JSON", "line is not JSON"),
        ({**ROW, "rejected": " is good"}, "identical"),
        (messages(prompt="p", chosen="a", rejected="b"), "text among messages"),
        ({**ROW, "part": "dev"}, "part is 'dev', not one of train, validation, test"),
        ({**ROW, "part": None}, "part is missing"),
        ({**ROW, "part": "train", "score": "1"}, "score is not a number"),
        ({**ROW, "part": "train", "score": True}, "score is not a number"),
        ({**ROW, "part": "train", "score": None}, "score is not a number"),
    ],
)
def test_rejects_have_only_a_reason(row: Any, reason: str, tokenizer: Any) -> None:
    rejected = reader(tokenizer, split_column="part", keep_columns=("score",)).read(row)
    assert list(rejected) == ["reason"]
    assert reason in rejected["reason"]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_rows_are_numbered(kind: str, tokenizer: Any, tmp_path: Path) -> None:
    rows = make_rows(2100)
    rows[7] |= {"chosen": ""}
    file = tmp_path / f"a.{kind}"
    if kind == "jsonl":
        write_jsonl(file, rows)
    else:
        pq.write_table(pa.Table.from_pylist(rows), file)
    table = pa.concat_tables(reader(tokenizer).tables(str(file), 3))
    assert table["row"].to_pylist() == list(range(2100))
    assert set(table["file_number"].to_pylist()) == {3}
    assert [i for i, reason in enumerate(table["reason"].to_pylist()) if reason] == [7]
