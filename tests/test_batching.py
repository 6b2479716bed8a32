"""The rows that a model reads, and the indices of responses in them."""

from typing import Any

import pytest

from madpo_ray.batching import collate
from madpo_ray.formats import split_joint


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
    assert batch.num_attended == int(batch.attention_mask.sum())


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


def test_chosen_responses_alone() -> None:
    batch = collate([row([5, 6], [7, 8], [9]), row([5], [4], [9])], shared_prefix=True, responses=["chosen_ids"])
    assert batch.input_ids.tolist() == [[5, 6, 7, 8], [5, 4, 0, 0]]
    assert batch.target_ids.tolist() == [7, 8, 4]
    assert batch.response_lengths.tolist() == [2, 1]
    assert batch.num_real_tokens == 6
