"""Which pairs are read together, and that their tensors are made once."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from madpo_ray.columns import RESPONSE_IDS
from madpo_ray.config import ForwardOptions, ModelConfig
from madpo_ray.passes import BatchNotes
from madpo_ray.scoring import batches
from madpo_ray.scoring.actors import ScoringActor
from madpo_ray.scoring.batches import Batches, Layout, cut_into_batches
from madpo_ray.scoring.scorers import EnsembleReward, PolicyLogps, Scorer, TrainedReward
from support.forwards import PAIRS
from support.models import make_reward_model

TABLE = pa.Table.from_pylist([{"pair_id": str(i), **pair} for i, pair in enumerate(PAIRS)])


def test_rows_are_cut_by_number_or_by_tokens() -> None:
    """Longest first; equal lengths keep their order."""
    lengths = np.array([3, 9, 5, 5, 1])
    for padded in (True, False):
        assert list(cut_into_batches(lengths, 2, None, padded=padded)) == [[1, 2], [3, 0], [4]]
        assert list(cut_into_batches(lengths, 2, 10, padded=padded)) == [[1], [2, 3], [0, 4]]
        assert list(cut_into_batches(lengths, 2, 18, padded=padded)) == [[1, 2], [3, 0, 4]]
        assert list(cut_into_batches(np.array([]), 2, None, padded=padded)) == []
    assert list(cut_into_batches(lengths, 2, 4, padded=True)) == [[1], [2], [3], [0], [4]]
    assert list(cut_into_batches(lengths, 2, 4, padded=False)) == [[1], [2], [3], [0, 4]]
    assert list(cut_into_batches(lengths, 2, 14, padded=True)) == [[1], [2, 3], [0, 4]]
    assert list(cut_into_batches(lengths, 2, 14, padded=False)) == [[1, 2], [3, 0, 4]]


@pytest.mark.parametrize("packed", [True, False])
def test_every_row_is_in_one_batch(packed: bool) -> None:
    made = list(Batches().micro_batches(TABLE, Layout(RESPONSE_IDS, 2, None, packed)))
    assert sorted(i for members, _ in made for i in members) == list(range(len(PAIRS)))
    for members, batch in made:
        lengths = [len(PAIRS[i][name]) for name in RESPONSE_IDS for i in members]
        assert batch.response_lengths.tolist() == lengths


def test_models_of_an_actor_share_batches(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also those of an ensemble; each table's are made once, and scores are as without."""
    make_reward_model().save_pretrained(tmp_path / "reward")
    model = ModelConfig(model_name_or_path=str(model_folder))

    def scorers() -> list[Scorer]:
        def reward() -> TrainedReward:
            return TrainedReward(
                tmp_path / "reward",
                model,
                columns=("reward_chosen", "reward_rejected"),
                forward=ForwardOptions(2),
            )

        logps = PolicyLogps(
            model_folder, model, columns=("chosen", "rejected"), forward=ForwardOptions(2)
        )
        return [logps, EnsembleReward([reward(), reward()])]

    expected: list[np.ndarray] = []
    columns: list[str] = []
    for scorer in scorers():
        scorer.load(torch.device("cpu"))
        expected += list(scorer(TABLE))
        columns += scorer.columns

    actor = ScoringActor(scorers(), torch.get_num_threads(), BatchNotes(tmp_path))
    made: list[int] = []
    collate = batches.collate
    monkeypatch.setattr(
        batches, "collate", lambda pairs, **more: made.append(len(pairs)) or collate(pairs, **more)
    )
    scored = actor(TABLE)
    assert made == [2, 2, 1]
    assert scored.column_names == ["pair_id", *columns, "reason"]
    for name, values in zip(columns, expected, strict=True):
        np.testing.assert_array_equal(scored[name].to_numpy(), values)
    actor(TABLE.slice(0, 2))
    assert made == [2, 2, 1, 2]


def test_rows_that_are_read_otherwise_have_batches_of_their_own() -> None:
    """Another number of responses, another size, other rows."""
    shared = Batches()
    first = list(shared.micro_batches(TABLE, Layout(RESPONSE_IDS, 2, None, True)))
    again = list(shared.micro_batches(TABLE, Layout(RESPONSE_IDS, 2, None, True)))
    assert all(one is other for (_, one), (_, other) in zip(first, again, strict=True))
    single = list(shared.micro_batches(TABLE, Layout(("chosen_ids",), 2, None, True)))
    assert len(single[0][1].response_lengths) == 2
    assert len(list(shared.micro_batches(TABLE, Layout(RESPONSE_IDS, 5, None, True)))) == 1
    fewer = list(shared.micro_batches(TABLE.slice(0, 1), Layout(RESPONSE_IDS, 2, None, True)))
    assert [members for members, _ in fewer] == [[0]]
