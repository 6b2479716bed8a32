"""The order of pairs, and how a step is cut into micro-batches."""

import dataclasses
import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from madpo_ray.artifacts.tables import read_split, write_table
from madpo_ray.data.micro_batches import MicroBatchReader, decode_micro_batch, pairs_of
from madpo_ray.data.order import Order, OrderSpec, StepPlace
from madpo_ray.data.order import order_epoch as order_arrays
from madpo_ray.data.splits import group_hash
from madpo_ray.errors import UserError
from support.ranks import MakeJob


def decoded(order: Order) -> list[tuple[list[dict[str, Any]], StepPlace]]:
    """All micro-batches of a run."""
    rows = MicroBatchReader(order).read(range(order.num_micro_batches))
    names = order.spec.token_columns
    return [decode_micro_batch(rows.slice(i, 1), names) for i in range(rows.num_rows)]


def order_epoch(lengths: np.ndarray, **settings: Any) -> list[list[np.ndarray]]:
    """Row numbers per step and micro-batch."""
    members, micro_batches, steps = order_arrays(lengths, **settings)
    cut = np.split(members, micro_batches[1:-1])
    return [cut[start:end] for start, end in itertools.pairwise(steps)]


def flat(steps: list[list[np.ndarray]]) -> list[int]:
    return [int(row) for step in steps for members in step for row in members]


@given(st.integers(1, 200), st.integers(1, 40), st.integers(1, 16), st.integers(0, 5))
def test_every_pair_is_in_an_epoch_once(
    count: int, global_size: int, micro_size: int, epoch: int
) -> None:
    lengths = np.random.default_rng(0).integers(3, 50, count)
    steps = order_epoch(
        lengths,
        seed=1,
        epoch=epoch,
        global_batch_size=global_size,
        micro_batch_size=micro_size,
    )
    assert sorted(flat(steps)) == list(range(count))
    assert all(sum(map(len, step)) == global_size for step in steps[:-1])
    assert all(len(members) <= micro_size for step in steps for members in step)


def test_depends_on_seed_and_epoch_only() -> None:
    lengths = np.arange(3, 103)

    def steps(seed: int, epoch: int, micro: int) -> list[set[int]]:
        ordered = order_epoch(
            lengths, seed=seed, epoch=epoch, global_batch_size=16, micro_batch_size=micro
        )
        return [{int(row) for members in step for row in members} for step in ordered]

    assert steps(0, 0, 4) == steps(0, 0, 4) == steps(0, 0, 7)
    assert steps(0, 0, 4) != steps(0, 1, 4)
    assert steps(0, 0, 4) != steps(1, 0, 4)
    assert steps(0, 1, 4) != steps(1, 0, 4)  # not a function of seed + epoch


def test_without_an_epoch_rows_keep_their_order() -> None:
    lengths = np.full(10, 5)
    steps = order_epoch(lengths, seed=0, epoch=None, global_batch_size=4, micro_batch_size=2)
    assert flat(steps) == list(range(10))


def test_steps_of_a_window_have_similar_lengths() -> None:
    """Sorted by length within windows: ranks have equally much to do."""
    lengths = np.random.default_rng(0).integers(1, 1000, 16 * 8)
    steps = order_epoch(lengths, seed=0, epoch=0, global_batch_size=8, micro_batch_size=8)
    spans = [int(np.ptp(lengths[members])) for (members,) in steps]
    assert max(spans) < 250
    means = [float(lengths[members].mean()) for (members,) in steps]
    assert means != sorted(means, reverse=True)


@given(st.integers(1, 200), st.integers(1, 40), st.integers(50, 400), st.booleans())
def test_budget_bounds_tokens(count: int, global_size: int, budget: int, padded: bool) -> None:
    """The same steps as without a budget: only their cut differs."""
    lengths = np.random.default_rng(0).integers(3, 50, count)
    sizes = {"global_batch_size": global_size, "micro_batch_size": 1}
    steps = order_epoch(lengths, seed=1, epoch=0, **sizes, max_tokens=budget, padded=padded)
    assert sorted(flat(steps)) == list(range(count))
    for step in steps:
        for members in step:
            own = lengths[members]
            assert (len(members) * own.max() if padded else own.sum()) <= budget
    uncut = order_epoch(lengths, seed=1, epoch=0, **sizes)
    joined = [np.concatenate(step).tolist() for step in steps]
    assert joined == [np.concatenate(step).tolist() for step in uncut]


@pytest.mark.parametrize("workers", [1, 2, 3, 4])
@pytest.mark.parametrize("cut", [{}, {"max_tokens_per_device": 80}])
def test_workers_get_equally_many_rows(
    workers: int, cut: dict[str, int], policy_job: MakeJob
) -> None:
    """In every step, filled up with empty micro-batches."""
    job = policy_job("rows", num_train_epochs=2, max_steps=-1, **cut)
    order = Order(job.order_spec(workers))
    rows = decoded(order)
    for step in range(order.total_steps):
        in_step = [(pairs, place) for pairs, place in rows if place.step == step]
        assert len(in_step) % workers == 0
        is_last = [place.is_last for _, place in in_step]
        assert is_last == [False] * (len(in_step) - workers) + [True] * workers
        num_pairs = sum(len(pairs) for pairs, _ in in_step)
        assert {place.pairs_in_step for _, place in in_step} == {num_pairs}
        assert rows[order.first_micro_batch(step)][1].step == step
    assert order.first_micro_batch(order.total_steps) == order.num_micro_batches

    def response_tokens(pair: dict[str, list[int]]) -> int:
        return len(pair["chosen_ids"]) + len(pair["rejected_ids"])

    largest = max(sum(map(response_tokens, pairs)) for pairs, _ in rows)
    assert order.max_response_tokens == largest


def test_epochs_read_each_pair_once(policy_job: MakeJob) -> None:
    job = policy_job("read", num_train_epochs=2, max_steps=-1)
    order = Order(job.order_spec(num_workers=3))
    rows = decoded(order)
    epochs: list[list[str]] = [[], []]
    for pairs, place in rows:
        epochs[place.step // order.steps_per_epoch] += [pair["pair_id"] for pair in pairs]
    everyone = read_split(job.rows, "train", ("pair_id",))["pair_id"].to_pylist()
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(everyone)
    assert epochs[0] != epochs[1]


def test_rows_hold_the_pairs_own_values(policy_job: MakeJob) -> None:
    job = policy_job("values")
    order = Order(job.order_spec(1))
    names = ("pair_id", "prompt_ids", "chosen_ids", "rejected_ids", "margin")
    table = read_split(job.rows, "train", names)
    by_id = {row["pair_id"]: row for row in table.to_pylist()}
    for pairs, _ in decoded(order):
        for pair in pairs:
            expected = by_id[pair["pair_id"]]
            assert {name: pair[name] for name in names} == expected


def test_pair_over_the_budget_is_refused(policy_job: MakeJob) -> None:
    job = policy_job("long", max_tokens_per_device=20)
    message = r"max_tokens_per_device: 20 is less than the longest pair's \d+ tokens"
    with pytest.raises(UserError, match=message):
        Order(job.order_spec(1))


def test_empty_split_is_refused(policy_job: MakeJob) -> None:
    spec = dataclasses.replace(policy_job("empty").order_spec(1), split="test")
    with pytest.raises(UserError, match=r"no pair of .* is in split 'test'"):
        Order(spec)


def test_separate_rows_count_the_prompt_twice(policy_job: MakeJob) -> None:
    """The order is that of the pairs' own lengths, whatever the rows."""
    spec = policy_job("separate").order_spec(1)
    packed = Order(spec)
    separate = Order(dataclasses.replace(spec, packed=False))
    tokens = read_split(spec.rows, "train", ("prompt_ids", "chosen_ids", "rejected_ids"))
    sizes = [[len(ids) for ids in row.values()] for row in tokens.to_pylist()]
    assert packed.tokens_read.tolist() == [p + c + r for p, c, r in sizes]
    assert separate.tokens_read.tolist() == [2 * (p + max(c, r)) for p, c, r in sizes]
    assert decoded(separate) == decoded(packed)


def test_budget_by_hand() -> None:
    """Two pairs of five tokens fill ten."""
    steps = order_epoch(
        np.full(6, 5),
        seed=0,
        epoch=None,
        global_batch_size=6,
        micro_batch_size=1,
        max_tokens=10,
    )
    assert [[len(members) for members in step] for step in steps] == [[2, 2, 2]]


@pytest.mark.parametrize(("padded", "sizes"), [(False, [1, 2, 3]), (True, [1, 1, 2, 2])])
def test_budget_counts_padding_where_there_is_some(padded: bool, sizes: list[int]) -> None:
    """Pairs of 1, 3, 5, 5, 6 and 9 tokens in micro-batches of at most 11, longest first."""
    steps = order_epoch(
        np.array([1, 3, 5, 5, 6, 9]),
        seed=0,
        epoch=None,
        global_batch_size=6,
        micro_batch_size=1,
        max_tokens=11,
        padded=padded,
    )
    assert [[len(members) for members in step] for step in steps] == [sizes]


def test_place_of_a_pair_on_its_own() -> None:
    expected = {"step": 0, "pairs_in_step": 1, "response_tokens_in_step": 1, "is_last": True}
    assert dataclasses.asdict(StepPlace()) == expected


def test_one_epoch_is_the_default(policy_job: MakeJob) -> None:
    spec = dataclasses.replace(policy_job("one").order_spec(1), num_epochs=1, max_steps=-1)
    assert OrderSpec.__dataclass_fields__["num_epochs"].default == 1
    order = Order(spec)
    assert order.total_steps == order.steps_per_epoch


def test_order_of_equal_lengths_is_stable() -> None:
    """So that it is the same on every machine and with every version of numpy."""
    steps = order_epoch(
        np.full(1000, 7), seed=0, epoch=None, global_batch_size=1000, micro_batch_size=1000
    )
    assert flat(steps) == list(range(1000))


def test_budget_counts_the_tokens_that_are_read(policy_job: MakeJob) -> None:
    """Of a row per response, not of a packed one."""
    spec = policy_job("budget", max_tokens_per_device=120).order_spec(1)
    sizes = {}
    for packed in (True, False):
        order = Order(dataclasses.replace(spec, packed=packed))
        sizes[packed] = [len(pairs) for pairs, _ in decoded(order)]
    assert len(sizes[False]) > len(sizes[True])
    assert max(sizes[False]) < max(sizes[True])


def test_place_counts_the_steps_response_tokens(policy_job: MakeJob) -> None:
    totals: dict[int, int] = {}
    places = {}
    for pairs, place in decoded(Order(policy_job("tokens").order_spec(1))):
        tokens = sum(len(pair["chosen_ids"]) + len(pair["rejected_ids"]) for pair in pairs)
        totals[place.step] = totals.get(place.step, 0) + tokens
        places[place.step] = place.response_tokens_in_step
    assert totals == places


def test_pairs_of_a_fold_are_left_out(policy_job: MakeJob, tmp_path: Path) -> None:
    """No group trains the model that scores it; all others are in each epoch once."""
    spec = policy_job("folds").order_spec(2)
    rows = pa.concat_tables(pq.read_table(file) for file in spec.rows.glob("*.parquet"))
    groups = [f"group {i // 3}" for i in range(rows.num_rows)]
    rows = rows.append_column("group_hash", pa.array([group_hash(group) for group in groups]))
    write_table(rows, tmp_path / "rows")
    train = [i for i, split in enumerate(rows["split"].to_pylist()) if split == "train"]

    for fold in range(3):
        order = Order(replace(spec, rows=tmp_path / "rows", fold=(fold, 3), max_steps=-1))
        numbers = range(order.num_micro_batches)
        members = sorted(int(row) for number in numbers for row in order.members(number)[0])
        seen = {groups[train[row]] for row in members}
        scored = {groups[i] for i in train if group_hash(groups[i]) % 3 == fold}
        assert seen.isdisjoint(scored)
        assert seen | scored == {groups[i] for i in train}
        expected = [row for row, i in enumerate(train) if groups[i] not in scored]
        assert members == expected
        table = MicroBatchReader(order).read([0])
        own = pairs_of(table, order.spec.token_columns)["pair_id"].to_pylist()
        assert own == [rows["pair_id"][train[int(row)]].as_py() for row in order.members(0)[0]]


def test_folds_without_pairs_are_refused(policy_job: MakeJob, tmp_path: Path) -> None:
    spec = policy_job("folds").order_spec(2)
    rows = pa.concat_tables(pq.read_table(file) for file in spec.rows.glob("*.parquet"))
    rows = rows.append_column("group_hash", pa.array([4] * rows.num_rows))
    write_table(rows, tmp_path / "rows")
    for fold in (0, 1):
        with pytest.raises(
            UserError, match=r"reward\.folds: 2 folds of 75 training pairs leave fold 1"
        ):
            Order(replace(spec, rows=tmp_path / "rows", fold=(fold, 2)))
