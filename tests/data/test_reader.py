"""Rows of a file become checked pairs or rejects."""

import copy
import json
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from madpo_ray.config import DataConfig
from madpo_ray.data.reader import PairReader, pairs_schema
from support.pairs import make_rows, messages, write_jsonl

ROW = {"prompt": "the film", "chosen": " is good", "rejected": " is bad", "score": 1.5}


def reader(tokenizer: Any, **changes: Any) -> PairReader:
    return PairReader(DataConfig(files=("x",), **changes), tokenizer, seed=0)


def test_reads_a_pair(tokenizer: Any) -> None:
    pair = reader(tokenizer, keep_columns=("score",)).read([ROW])[0]
    assert pair["prompt"] == "the film"
    assert pair["group"] == '"the film"'
    assert pair["split"] in ("train", "validation", "test")
    assert pair["score"] == 1.5
    assert pair["chosen_ids"][-1] == tokenizer.eos_token_id
    assert (pair["num_cut"], pair["prompt_repeats"]) == (0, 0)


def test_messages_are_stored_as_json(tokenizer: Any) -> None:
    row = messages(prompt="p", chosen="a", rejected="b")
    pair = reader(tokenizer).read([row])[0]
    assert {name: json.loads(pair[name]) for name in row} == row


@pytest.mark.parametrize(
    ("row", "kind", "reason"),
    [
        ("line is not JSON: x", "line is not JSON", "line is not JSON: x"),
        ({**ROW, "rejected": " is good"}, "chosen and rejected are identical", "identical"),
        ({**ROW, "part": "dev"}, "part is not one of train, validation, test", "'dev'"),
        ({**ROW, "part": None}, "part is missing", "part is missing"),
        ({**ROW, "part": "\ud83d"}, "part is not valid Unicode (half a surrogate pair)", "half"),
        ({**ROW, "score": "1"}, "score is not a number", "str"),
        ({**ROW, "score": True}, "score is not a number", "bool"),
        ({**ROW, "score": None}, "score is not a number", "NoneType"),
        ({**ROW, "score": float("nan")}, "score is not a finite number", "finite"),
        ({**ROW, "score": 10**400}, "score is not a finite number", "finite"),
        ({**ROW, "chosen": " \ud83d"}, "chosen is not valid Unicode (half a surrogate pair)", "h"),
    ],
)
def test_rejects_have_only_a_reason(row: Any, kind: str, reason: str, tokenizer: Any) -> None:
    """And its kind, without the row's values, by which reasons are counted."""
    if isinstance(row, dict):
        row = {"part": "train", **row}
    rejected = reader(tokenizer, split_column="part", keep_columns=("score",)).read([row])[0]
    assert rejected.keys() == {"reason", "reason_kind"}
    assert rejected["reason_kind"] == kind
    assert reason in rejected["reason"]


def test_unexpected_errors_are_reasons(tokenizer: Any) -> None:
    """Whatever a tokenizer raises about a row."""

    class Failing:
        bos_token_id = eos_token_id = None

        def __call__(self, texts: list[str], **options: Any) -> None:
            raise ZeroDivisionError("\ud83d")

    rejected = reader(Failing()).read([ROW])[0]
    assert rejected["reason_kind"] == "the row cannot be read (ZeroDivisionError)"
    assert rejected["reason"].endswith(": \\ud83d")


def test_row_that_a_tokenizer_refuses_is_the_only_reject(tokenizer: Any) -> None:
    """All rows are tokenised in one call."""

    class Picky:
        bos_token_id = None
        eos_token_id = tokenizer.eos_token_id
        num_calls = 0

        def __call__(self, texts: list[str], **options: Any) -> Any:
            self.num_calls += 1
            if any("7" in text for text in texts):
                raise ValueError("no sevens")
            return tokenizer(texts, **options)

    rows = [{**ROW, "prompt": f"film {i}"} for i in range(9)]
    picky = Picky()
    assert reader(picky).read(rows[:5]) == reader(tokenizer).read(rows[:5])
    assert picky.num_calls == 1
    found = reader(picky).read([*rows, "a reason: of the source"])
    assert [one.get("reason") for one in found[7::2]] == [
        "the row cannot be read (ValueError): no sevens",
        "a reason: of the source",
    ]
    assert found[:7] + found[8:9] == reader(tokenizer).read(rows[:7] + rows[8:])


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


class Mixer:
    """Rows of any kind: layouts of pairs with values of any kind in any place."""

    SCALARS = (
        None,
        True,
        0,
        -1.5,
        1e400,
        10**400,
        "",
        " ",
        "film",
        "\ud83d",
        "\x00\x1b[31m",
        "\u2028",
        "[{",
        '[{"role": "user", "content": "film"}]',
    )

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)

    def value(self, depth: int = 0) -> Any:
        rng = self._rng
        kind = rng.random()
        if depth > 3 or kind < 0.6:
            return rng.choice(self.SCALARS)
        if kind < 0.8:
            return [self.value(depth + 1) for _ in range(rng.randrange(3))]
        names = ("role", "content", "type", "text", "tool_calls", "x")
        return {rng.choice(names): self.value(depth + 1) for _ in range(rng.randrange(4))}

    def row(self) -> Any:
        rng = self._rng
        row: Any = make_rows(1, rng.randrange(50), conversational=rng.random() < 0.5)[0]
        if rng.random() < 0.2:
            row = {"chosen": row["prompt"] + row["chosen"], "rejected": row["prompt"]}
        for name in ("prompt", "chosen", "rejected", "part", "score", "tools", "group"):
            if rng.random() < 0.25:
                row[name] = self.value()
            if rng.random() < 0.05:
                row.pop(name, None)
        return row


def texts_of(stored: str) -> list[str]:
    """The text of a stored column, or those of its messages."""
    try:
        messages = json.loads(stored)
        contents = [message.get("content") or "" for message in messages]
    except (ValueError, TypeError, AttributeError):
        return [stored]
    parts = [[{"text": text}] if isinstance(text, str) else text for text in contents]
    return [part["text"] for content in parts for part in content]


def test_any_row_is_a_pair_or_a_reject(tokenizer: Any) -> None:
    """20,000 mixed rows: none raises, and what is accepted says what the row says."""
    mixer = Mixer(0)
    strict = reader(tokenizer, keep_columns=("chosen_score",), max_length=200)
    schema = pairs_schema(DataConfig(files=("x",), keep_columns=("chosen_score",)))
    accepted = 0
    block: list[Any] = []
    results: list[Any] = []
    for _ in range(20_000):
        row = mixer.row()
        before = copy.deepcopy(row)
        result = strict.read([row])[0]
        assert repr(row) == repr(before)

        # Many rows at a time give the same: texts, messages and what the tokenizer refuses.
        block.append(row)
        results.append(result)
        if len(block) == 500:
            assert strict.read(block) == results
            block, results = [], []

        table = pa.Table.from_pylist([result], schema=schema)
        if result.get("reason") is not None:
            assert table["reason"][0].as_py()
            continue
        accepted += 1
        source = json.dumps(row, default=repr) + repr(row)
        for name in ("prompt", "chosen", "rejected"):
            for text in texts_of(result[name]):
                assert text in source or json.dumps(text)[1:-1] in source
    assert accepted > 1000


def test_tables_are_of_a_thousand_rows(tokenizer: Any, tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", make_rows(2100))
    sizes = [table.num_rows for table in reader(tokenizer).tables(str(file), 0)]
    assert sizes == [1024, 1024, 52]


@pytest.mark.parametrize("value", ["", " ", None, float("nan"), float("inf")])
def test_pairs_without_a_group_are_rejects(value: Any, tokenizer: Any) -> None:
    """They would all be one group."""
    read = reader(tokenizer, group_column="source").read([{**ROW, "source": value}])[0]
    assert read["reason"] == "source is missing"


def test_group_is_text_or_number(tokenizer: Any) -> None:
    group = reader(tokenizer, group_column="source")
    assert group.read([{**ROW, "source": 7}])[0]["group"] == "7"
    assert group.read([{**ROW, "source": 7.0}])[0]["group"] == "7"  # integers next to nulls
    assert group.read([{**ROW, "source": [7]}])[0]["reason"] == (
        "source is neither text nor a number: list"
    )
