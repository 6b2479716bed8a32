"""The rows that a model reads, and the indices of responses in them."""

from typing import Any

import pytest
import torch

from madpo_ray.data.batching import Segment, collate
from madpo_ray.data.order import StepPlace


def pair(prompt: list[int], chosen: list[int], rejected: list[int], **more: Any) -> dict[str, Any]:
    return {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected, **more}


def test_packed_row_by_hand() -> None:
    """The first token of both responses is predicted by the prompt's last: none is dropped."""
    pairs = [pair([5, 6], [7, 8], [9], pair_id="a", margin=0.5)]
    batch = collate(pairs, packed=True, column_names=["margin"])
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9]]
    assert batch.predictor_index.tolist() == [1, 2, 1]
    assert batch.target_ids.tolist() == [7, 8, 9]
    assert batch.response_of_target.tolist() == [0, 0, 1]
    assert batch.last_index.tolist() == [3, 4]
    row = batch.packed_row
    assert row is not None
    assert row.segments == (Segment(0, 0, 0, 4), Segment(0, 2, 4, 5))
    assert row.position_ids.tolist() == [[0, 1, 2, 3, 2]]
    assert row.key_index.tolist() == [0, 1, 2, 3, 0, 1, 4]
    assert row.first_keys.tolist() == [0, 1, 2, 3, 6]
    assert (row.prompt_tokens.tolist(), row.second_keys.tolist()) == ([0, 1], [4, 5])
    assert row.query_ends.tolist() == [0, 4, 5]
    assert row.key_ends.tolist() == [0, 4, 7]
    assert (row.max_queries, row.max_keys) == (4, 4)
    assert batch.columns["margin"].tolist() == [0.5]
    assert batch.num_attended == 10 + 3
    assert batch.num_real_tokens == 5
    assert batch.pair_ids == ("a",)


@pytest.mark.parametrize("packed", [True, False])
def test_targets_are_response_tokens(packed: bool) -> None:
    pairs = [pair([1, 2, 3], [4, 5], [6, 7, 8]), pair([1], [2], [3])]
    batch = collate(pairs, packed=packed)
    flat_ids = batch.input_ids.flatten()
    for number, expected in enumerate([[4, 5], [2], [6, 7, 8], [3]]):
        own = batch.response_of_target == number
        assert batch.target_ids[own].tolist() == expected
        assert flat_ids[batch.last_index[number]] == expected[-1]
        assert flat_ids[batch.predictor_index[own][1:]].tolist() == expected[:-1]
    assert batch.response_lengths.tolist() == [2, 1, 3, 1]
    assert batch.num_real_tokens == (11 if packed else 15)


def test_filler_counts_for_nothing() -> None:
    batch = collate([], packed=True, column_names=["margin"])
    assert batch.valid.tolist() == [0]
    assert batch.input_ids.shape == (1, 3)
    assert (batch.num_real_tokens, batch.num_attended, batch.pair_ids) == (0, 0, ())


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("empty", ["prompt_ids", "chosen_ids", "rejected_ids"])
def test_empty_parts_are_refused(packed: bool, empty: str) -> None:
    with pytest.raises(ValueError, match=empty):
        collate([{**pair([1], [3], [2]), empty: []}], packed=packed)


@pytest.mark.parametrize("packed", [True, False])
def test_single_response(packed: bool) -> None:
    pairs = [pair([5, 6], [7, 8], [9]), pair([5], [4], [9])]
    batch = collate(pairs, packed=packed, responses=["chosen_ids"])
    packed_ids, padded_ids = [[5, 6, 7, 8, 5, 4]], [[5, 6, 7, 8], [5, 4, 0, 0]]
    assert batch.input_ids.tolist() == (packed_ids if packed else padded_ids)
    assert batch.target_ids.tolist() == [7, 8, 4]
    assert batch.response_lengths.tolist() == [2, 1]
    assert batch.num_real_tokens == 6


def test_keeps_its_place() -> None:
    place = StepPlace(step=3, pairs_in_step=8, response_tokens_in_step=40, is_last=False)
    batch = collate([pair([1], [2], [3])], packed=True, place=place)
    assert batch.place == place


def test_moves_every_tensor() -> None:
    pairs = [pair([1], [2], [3], margin=0.5, pair_id="a")]
    moved = collate(pairs, packed=True, column_names=["margin"]).to(torch.device("meta"))
    row = moved.packed_row
    assert row is not None
    parts = [*vars(moved).values(), *vars(row).values()]
    tensors = [value for value in parts if isinstance(value, torch.Tensor)]
    assert len(tensors) == 7 + 7
    assert all(tensor.is_meta for tensor in [*tensors, moved.columns["margin"]])
    assert moved.pair_ids == ("a",)
