"""Micro-batches as rows of a table."""

import dataclasses
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from madpo_ray import columns
from madpo_ray.artifacts.tables import read_split, write_table
from madpo_ray.data.micro_batches import (
    NUMBER,
    STEP_FIELDS,
    TOKEN_COUNTS,
    TOKENS,
    MicroBatchReader,
    decode_micro_batch,
    pairs_of,
    with_columns,
)
from madpo_ray.data.order import Order
from support.ranks import MakeJob


def test_columns_of_pairs_cannot_take_the_names_of_fields() -> None:
    """They would overwrite them."""
    assert {NUMBER, TOKENS, TOKEN_COUNTS, *STEP_FIELDS} == set(columns.MICRO_BATCH)


def test_several_at_once_are_the_same_as_one_by_one(policy_job: MakeJob) -> None:
    order = Order(policy_job("chunks").order_spec(3))
    reader = MicroBatchReader(order)
    numbers = range(1, order.num_micro_batches, 3)
    names = order.spec.token_columns
    together = reader.read(numbers)
    assert together[NUMBER].to_pylist() == list(numbers)
    for row, number in enumerate(numbers):
        alone = reader.read([number])
        assert decode_micro_batch(together.slice(row, 1), names) == decode_micro_batch(alone, names)


def test_empty_micro_batch_fills_up(policy_job: MakeJob) -> None:
    """It has its place, and no pairs."""
    spec = dataclasses.replace(policy_job("fill").order_spec(3), global_batch_size=2)
    order = Order(spec)
    row = MicroBatchReader(order).read([2])
    pairs, place = decode_micro_batch(row, spec.token_columns)
    assert pairs == []
    assert place.step == 0
    assert place.pairs_in_step == 2
    assert place.is_last


def test_pairs_of_micro_batches_are_the_rows(policy_job: MakeJob) -> None:
    """Tokens and own values; an empty micro-batch has none."""
    spec = dataclasses.replace(policy_job("fill").order_spec(3), global_batch_size=2)
    order = Order(spec)
    table = MicroBatchReader(order).read(range(9))
    pairs = pairs_of(table, spec.token_columns)
    members = [row for number in range(9) for row in order.members(number)[0]]
    assert len(members) == 6
    names = ("pair_id", *spec.token_columns, *spec.columns)
    rows = read_split(spec.rows, "train", names)
    assert pairs.select(names).to_pylist() == rows.take(members).to_pylist()


def test_numbers_come_back_to_their_pairs(policy_job: MakeJob) -> None:
    spec = dataclasses.replace(policy_job("fill").order_spec(3), global_batch_size=2)
    table = MicroBatchReader(Order(spec)).read(range(9))
    pairs = pairs_of(table, spec.token_columns)
    added = pa.table({"twice": [f"{one} {one}" for one in pairs["pair_id"].to_pylist()]})
    table = with_columns(table, added)
    found = [decode_micro_batch(table.slice(i, 1), spec.token_columns)[0] for i in range(9)]
    decoded = [pair for pairs in found for pair in pairs]
    assert len(decoded) == 6
    assert all(pair["twice"] == f"{pair['pair_id']} {pair['pair_id']}" for pair in decoded)


def test_texts_come_with_their_pairs(policy_job: MakeJob, tmp_path: Path) -> None:
    """If the spec asks for them."""
    spec = policy_job("texts").order_spec(1)
    rows = pa.concat_tables(pq.read_table(file) for file in spec.rows.glob("*.parquet"))
    texts = pa.array([f"of {one}" for one in rows["pair_id"].to_pylist()])
    write_table(rows.append_column("chosen", texts), tmp_path / "rows")
    spec = dataclasses.replace(
        spec, rows=tmp_path / "rows", token_files=tmp_path / "flat", text_columns=("chosen",)
    )
    pairs = pairs_of(MicroBatchReader(Order(spec)).read(range(4)), spec.token_columns)
    assert pairs.num_rows > 4
    ids = pairs["pair_id"].to_pylist()
    assert pairs["chosen"].to_pylist() == [f"of {one}" for one in ids]
