"""Order, micro-batches, and the indices of responses."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from madpo_ray.batching import collate
from madpo_ray.formats import split_joint
from madpo_ray.plan import plan_epoch


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


def row(prompt: list[int], chosen: list[int], rejected: list[int], **more: Any) -> dict[str, Any]:
    return {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected, **more}


def test_a_shared_row_by_hand() -> None:
    batch = collate([row([5, 6], [7, 8], [9], pair_id="a", margin=0.5)], shared_prefix=True, column_names=["margin"])
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 2]]
    # The first token of both responses is predicted by the prompt's last: none is dropped.
    assert batch.predictor_index.tolist() == [1, 2, 1]
    assert batch.target_ids.tolist() == [7, 8, 9]
    assert batch.response_of_target.tolist() == [0, 0, 1]
    assert batch.last_index.tolist() == [3, 4]
    assert batch.attention_mask[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 1, 1, 0],
        [1, 1, 0, 0, 1],
    ]
    assert batch.columns["margin"].tolist() == [0.5]


@pytest.mark.parametrize("shared", [True, False])
def test_targets_are_response_tokens_only(shared: bool) -> None:
    rows = [row([1, 2, 3], [4, 5], [6, 7, 8]), row([1], [2], [3])]
    batch = collate(rows, shared_prefix=shared)
    flat_ids = batch.input_ids.flatten()
    for number, expected in enumerate([[4, 5], [2], [6, 7, 8], [3]]):
        mine = batch.response_of_target == number
        assert batch.target_ids[mine].tolist() == expected
        assert flat_ids[batch.last_index[number]] == expected[-1]
        assert flat_ids[batch.predictor_index[mine][1:]].tolist() == expected[:-1]
    assert batch.response_lengths.tolist() == [2, 1, 3, 1]


def test_an_empty_micro_batch_is_a_filler_that_counts_for_nothing() -> None:
    batch = collate([], shared_prefix=True, column_names=["margin"])
    assert batch.valid.tolist() == [0]
    assert batch.input_ids.shape == (1, 3)


@pytest.mark.parametrize("shared", [True, False])
def test_empty_responses_are_refused(shared: bool) -> None:
    with pytest.raises(ValueError, match="chosen_ids"):
        collate([row([1], [], [2])], shared_prefix=shared)


def test_split_on_the_joint_tokens() -> None:
    assert split_joint([1, 2], [1, 2, 3], [1, 2, 4]) == 2
    # The tokenizer merged the prompt's last token with the response's first: 2 + 3 -> 9.
    assert split_joint([1, 2], [1, 9, 3], [1, 2, 4]) == 1
    assert split_joint([1, 2], [7, 2], [1, 2]) == 0
