"""The order of pairs, and how a step is cut into micro-batches."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from madpo_ray.config import UserError
from madpo_ray.plan import Plan, plan_epoch


def flat(steps: list[list[np.ndarray]]) -> list[int]:
    return [int(row) for step in steps for members in step for row in members]


@given(st.integers(1, 200), st.integers(1, 40), st.integers(1, 16), st.integers(0, 5))
def test_every_pair_stands_in_an_epoch_once(count: int, global_size: int, micro_size: int, epoch: int) -> None:
    lengths = np.random.default_rng(0).integers(3, 50, count)
    steps = plan_epoch(lengths, seed=1, epoch=epoch, global_batch_size=global_size, micro_batch_size=micro_size)
    assert sorted(flat(steps)) == list(range(count))
    assert all(sum(map(len, step)) == global_size for step in steps[:-1])
    assert all(len(members) <= micro_size for step in steps for members in step)


def test_order_depends_on_seed_and_epoch_and_on_nothing_else() -> None:
    lengths = np.arange(3, 103)

    def steps(seed: int, epoch: int, micro: int) -> list[set[int]]:
        plan = plan_epoch(lengths, seed=seed, epoch=epoch, global_batch_size=16, micro_batch_size=micro)
        return [{int(row) for members in step for row in members} for step in plan]

    assert steps(0, 0, 4) == steps(0, 0, 4) == steps(0, 0, 7)
    assert steps(0, 0, 4) != steps(0, 1, 4)
    assert steps(0, 0, 4) != steps(1, 0, 4)


def test_without_an_epoch_pairs_keep_their_order() -> None:
    steps = plan_epoch(np.full(10, 5), seed=0, epoch=None, global_batch_size=4, micro_batch_size=2)
    assert flat(steps) == list(range(10))


@given(st.integers(1, 200), st.integers(1, 40), st.integers(50, 400))
def test_a_budget_bounds_padded_tokens(count: int, global_size: int, budget: int) -> None:
    lengths = np.random.default_rng(0).integers(3, 50, count)
    sizes = {"global_batch_size": global_size, "micro_batch_size": 1}
    steps = plan_epoch(lengths, seed=1, epoch=0, **sizes, max_tokens=budget)
    assert sorted(flat(steps)) == list(range(count))
    assert all(len(members) * lengths[members].max() <= budget for step in steps for members in step)
    # The same steps as without a budget: only their cut differs.
    uncut = plan_epoch(lengths, seed=1, epoch=0, **sizes)
    assert [np.concatenate(step).tolist() for step in steps] == [np.concatenate(step).tolist() for step in uncut]


@pytest.mark.parametrize("workers", [1, 2, 3, 4])
@pytest.mark.parametrize("cut", [{}, {"max_tokens_per_device": 80}])
def test_every_worker_gets_equally_many_rows_of_a_step(
    workers: int, cut: dict[str, int], policy_job: Callable[..., Any]
) -> None:
    job = policy_job("rows", num_train_epochs=2, max_steps=-1, **cut)
    plan = Plan(job.plan(workers))
    rows = [plan.row(number).to_pylist()[0] for number in range(plan.num_rows)]
    for step in range(plan.total_steps):
        of_step = [row for row in rows if row["step"] == step]
        assert len(of_step) % workers == 0
        assert [row["last_of_step"] for row in of_step] == [False] * (len(of_step) - workers) + [True] * workers
        assert {row["pairs_in_step"] for row in of_step} == {sum(len(row["pair_id"]) for row in of_step)}
        assert rows[plan.first_row(step)]["step"] == step
    assert plan.first_row(plan.total_steps) == plan.num_rows
    longest = max(sum(len(ids) for name in ("chosen_ids", "rejected_ids") for ids in row[name]) for row in rows)
    assert plan.max_response_tokens == longest


def test_a_pair_longer_than_the_budget_is_refused(policy_job: Callable[..., Any]) -> None:
    job = policy_job("long", max_tokens_per_device=20)
    with pytest.raises(UserError, match=r"max_tokens_per_device: 20 is less than the longest pair's \d+ tokens"):
        Plan(job.plan(1))


def test_two_rows_a_pair_count_the_prompt_twice(policy_job: Callable[..., Any]) -> None:
    spec = policy_job("unshared").plan(1)
    shared, unshared = (Plan(dataclasses.replace(spec, shared_prefix=on)) for on in (True, False))
    assert (unshared._read_tokens > shared._read_tokens).all()
    # The order is that of the pairs' own lengths, whatever the rows.
    assert [unshared.row(i) for i in range(4)] == [shared.row(i) for i in range(4)]
