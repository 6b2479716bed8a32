"""Scorers of pairs."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from madpo_ray.config import ForwardOptions, ModelConfig
from madpo_ray.errors import UserError
from madpo_ray.models.loading import load_policy
from madpo_ray.passes import REFUSAL, BatchNotes
from madpo_ray.scoring.actors import MAX_FAILED_BATCHES, MAX_FAILURES, ScoringActor
from madpo_ray.scoring.chunks import ScoredChunks
from madpo_ray.scoring.scorers import (
    CrossFittedReward,
    EnsembleReward,
    PolicyLogps,
    Scorer,
    TrainedReward,
    score_or_explain,
)
from support.forwards import PAIRS, separate_logp
from support.models import make_model, make_reward_model


@pytest.fixture
def model(model_folder: Path) -> ModelConfig:
    return ModelConfig(model_name_or_path=str(model_folder))


def loaded(scorer: Any) -> Any:
    scorer.load(torch.device("cpu"))
    return scorer


def test_model_that_cannot_be_scored_with_is_refused(
    model: ModelConfig, model_folder: Path, tmp_path: Path
) -> None:
    """The reason travels as a column: Ray Data would make a traceback of an exception."""
    spoiled: Any = load_policy(model_folder, model)
    with torch.no_grad():
        spoiled.lm_head.weight[7] = torch.nan
    spoiled.save_pretrained(tmp_path)
    scorer = PolicyLogps(tmp_path, model, columns=("chosen", "rejected"), forward=ForwardOptions(2))
    rows = pa.Table.from_pylist([{"pair_id": str(i), **pair} for i, pair in enumerate(PAIRS)])
    table = ScoringActor([scorer], 1, BatchNotes(tmp_path))(rows)
    assert table.column_names == ["pair_id", REFUSAL]
    assert "own numbers are not finite" in table[REFUSAL][4].as_py()


@pytest.mark.parametrize("limits", [(1, None), (2, None), (8, None), (8, 40)])
@pytest.mark.parametrize("packed_rows", ["auto", "off"])
def test_scores_keep_the_order_of_rows(
    limits: tuple[int, int | None], packed_rows: str, model: ModelConfig, model_folder: Path
) -> None:
    """Whatever the order by length, and the batches."""
    model = model.model_copy(update={"packed_rows": packed_rows})
    names = ("chosen", "rejected")
    forward = ForwardOptions(*limits)
    scorer = loaded(PolicyLogps(model_folder, model, columns=names, forward=forward))
    scores = scorer(pa.Table.from_pylist(PAIRS))
    plain = make_model()
    with torch.no_grad():
        for row, side in enumerate(("chosen_ids", "rejected_ids")):
            expected = [float(separate_logp(plain, p["prompt_ids"], p[side])) for p in PAIRS]
            np.testing.assert_allclose(scores[row], expected, atol=1e-4)


@pytest.mark.parametrize("packed_rows", ["auto", "off"])
def test_forwards_keep_to_the_tokens(
    packed_rows: str, model: ModelConfig, model_folder: Path
) -> None:
    """And are as large as that allows; a pair that is longer is read alone."""
    model = model.model_copy(update={"packed_rows": packed_rows})
    names = ("chosen", "rejected")
    scorer = PolicyLogps(model_folder, model, columns=names, forward=ForwardOptions(1, 80))
    loaded(scorer)
    sizes = []
    scorer._module.register_forward_pre_hook(
        lambda _, inputs: sizes.append((len(inputs[0].valid), inputs[0].input_ids.numel()))
    )
    scorer(pa.Table.from_pylist(PAIRS))
    assert sum(pairs for pairs, _ in sizes) == len(PAIRS)
    assert all(tokens <= 80 for pairs, tokens in sizes if pairs > 1)
    assert any(pairs > 1 for pairs, _ in sizes)


def test_scores_rewards(model: ModelConfig, tmp_path: Path) -> None:
    plain = make_reward_model()
    plain.save_pretrained(tmp_path)
    scorer = loaded(
        TrainedReward(tmp_path, model, columns=("chosen", "rejected"), forward=ForwardOptions(2))
    )
    scores = scorer(pa.Table.from_pylist(PAIRS))
    for row, side in enumerate(("chosen_ids", "rejected_ids")):
        for pair, value in zip(PAIRS, scores[row], strict=True):
            ids = torch.tensor([pair["prompt_ids"] + pair[side]])
            with torch.no_grad():
                hidden = plain.model(input_ids=ids).last_hidden_state[0, -1]
                assert value == pytest.approx(float(plain.score(hidden)[0]), abs=1e-5)


class Constant:
    """A scorer of a user's own: nothing but the protocol."""

    reads = ()
    columns = ("chosen_reward", "rejected_reward")

    def __init__(self, rejected: list[float]) -> None:
        self._rejected = rejected

    def load(self, device: torch.device) -> None:
        self._is_loaded = True

    def __call__(self, rows: pa.Table) -> np.ndarray:
        assert self._is_loaded
        return np.array([[1.0] * rows.num_rows, self._rejected])


def test_actor_runs_any_scorer(tmp_path: Path) -> None:
    scorer: Scorer = Constant([2.0, 3.0])
    rows = pa.table({"pair_id": ["a", "b"]})
    scored = ScoringActor([scorer], torch.get_num_threads(), BatchNotes(tmp_path))(rows)
    assert scored.to_pydict() == {
        "pair_id": ["a", "b"],
        "chosen_reward": [1.0, 1.0],
        "rejected_reward": [2.0, 3.0],
        "reason": [None, None],
    }


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_pair_without_a_score_has_a_reason(value: str, tmp_path: Path) -> None:
    """And no number of that scorer's."""
    scorers: list[Scorer] = [Constant([2.0, float(value)]), Failing("none")]
    actor = ScoringActor(scorers, torch.get_num_threads(), BatchNotes(tmp_path))
    first, second = actor(pa.table({"pair_id": ["a", "b"]})).to_pylist()
    assert first["reason"] is None
    assert second["reason"] == f"rejected_reward is {value}"
    assert math.isnan(second["chosen_reward"])
    assert second["number"] == 1.0


def test_each_pair_is_scored_by_the_model_of_its_fold() -> None:
    """Whatever the order of the rows; a fold may have none."""

    class Fold:
        def __init__(self, number: int) -> None:
            self._number = number

        def load(self, device: torch.device) -> None:
            """Nothing to load."""

        def __call__(self, rows: pa.Table) -> np.ndarray:
            return np.array([[self._number] * rows.num_rows, rows["group_hash"].to_pylist()])

    models: Any = [Fold(number) for number in range(3)]
    hashes = [7, 3, 4, 6, 9, 10]
    scores = loaded(CrossFittedReward(models))(pa.table({"group_hash": hashes}))
    assert scores.tolist() == [[1, 0, 1, 0, 0, 1], hashes]


def test_ensemble_is_the_mean_and_says_how_far_its_members_differ() -> None:
    class Judge:
        def __init__(self, reads: tuple[str, ...], chosen: float, rejected: float) -> None:
            self.reads = reads
            self._rewards = [[chosen] * 2, [rejected] * 2]

        def load(self, device: torch.device) -> None:
            self._is_loaded = True

        def __call__(self, rows: pa.Table) -> np.ndarray:
            assert self._is_loaded
            return np.array(self._rewards)

    members: Any = [Judge(("prompt", "chosen"), 3, 1), Judge(("chosen", "prompt_ids"), 2, 2)]
    scorer = loaded(EnsembleReward(members))
    assert scorer.reads == ("prompt", "chosen", "prompt_ids")
    assert scorer.columns == ("chosen_reward", "rejected_reward", "margin_std")
    scores = scorer(pa.table({"prompt": ["a", "b"]}))
    np.testing.assert_allclose(scores, [[2.5] * 2, [1.5] * 2, [2**0.5] * 2])


class Failing:
    """A judge that fails for one pair, in any batch with it."""

    reads = ()
    columns = ("number",)

    def __init__(self, victim: str) -> None:
        self._victim = victim

    def load(self, device: torch.device) -> None:
        """Nothing to load."""

    def __call__(self, rows: pa.Table) -> np.ndarray:
        if any(one.startswith(self._victim) for one in rows["pair_id"].to_pylist()):
            raise KeyError("no such judge")
        return np.ones((1, rows.num_rows))


def test_pair_that_makes_a_scorer_fail_has_a_reason() -> None:
    """The others of its batch have their scores."""
    rows = pa.table({"pair_id": ["a", "b", "c"]})
    scores, reasons = score_or_explain(Failing("b"), rows)
    assert reasons == ["", "raised KeyError: 'no such judge'", ""]
    assert np.isnan(scores).tolist() == [[False, True, False]]


@pytest.mark.parametrize("scorer", [Failing("b"), Constant([math.nan])], ids=["raises", "nan"])
def test_scorer_that_fails_for_every_pair_ends_the_pass(scorer: Any, tmp_path: Path) -> None:
    """After some pairs: it is the scorer, not the pairs. One success is enough to continue."""
    actor = ScoringActor([scorer], torch.get_num_threads(), BatchNotes(tmp_path))
    bad = pa.table({"pair_id": ["b"]})
    for _ in range(MAX_FAILURES - 1):
        assert actor(bad)["reason"][0].as_py()
    (refusal,) = actor(bad)["refusal"].to_pylist()
    assert refusal.startswith("none of the first 16 pairs could be scored, such as b: ")


def test_batch_of_failures_does_not_end_a_pass(tmp_path: Path) -> None:
    """Pairs that a judge fails for may stand together, also in the first batches."""
    actor = ScoringActor([Failing("bad")], torch.get_num_threads(), BatchNotes(tmp_path))
    bad = pa.table({"pair_id": [f"bad{i}" for i in range(4 * MAX_FAILURES)]})
    for _ in range(MAX_FAILED_BATCHES - 1):
        assert actor(bad)["reason"].null_count == 0
    assert actor(pa.table({"pair_id": ["a"]}))["reason"].null_count == 1
    assert actor(bad)["reason"].null_count == 0


def test_success_of_another_actor_counts(tmp_path: Path) -> None:
    """Of one that began at the same time."""
    notes, kept = BatchNotes(tmp_path), tmp_path / "kept"
    first, second = (
        ScoringActor([Failing("bad")], torch.get_num_threads(), notes, kept) for _ in range(2)
    )
    batches = [
        pa.table({"pair_id": [f"bad{i}-{j}" for i in range(MAX_FAILURES)]})
        for j in range(2 * MAX_FAILED_BATCHES)
    ]
    assert second(batches[0])["reason"].null_count == 0
    assert first(pa.table({"pair_id": ["a"]}))["reason"].null_count == 1
    for batch in batches[1:]:
        assert second(batch)["reason"].null_count == 0


def test_one_success_is_enough(tmp_path: Path) -> None:
    actor = ScoringActor([Failing("b")], torch.get_num_threads(), BatchNotes(tmp_path))
    actor(pa.table({"pair_id": ["a"]}))
    for _ in range(2 * MAX_FAILURES):
        assert actor(pa.table({"pair_id": ["b"]}))["reason"][0].as_py()


def test_pass_that_resumes_meets_its_failures_first(tmp_path: Path) -> None:
    """What was scored before shows that it is not the scorer."""
    bad = [f"bad{i}" for i in range(2 * MAX_FAILURES)]
    rows = pa.table({"pair_id": ["a", *bad]})
    notes = BatchNotes(tmp_path)
    kept = tmp_path / "kept"
    ScoringActor([Failing("bad")], torch.get_num_threads(), notes, kept)(rows)
    again = ScoringActor([Failing("bad")], torch.get_num_threads(), notes, kept)
    assert again(rows.slice(1))["reason"].null_count == 0
    assert again(rows)["reason"].null_count == 1


def test_exceptions_are_tried_again(tmp_path: Path) -> None:
    """A service that did not answer is asked again; a number that is not finite stays so."""
    kept = tmp_path / "kept"
    rows = pa.table({"pair_id": ["a", "b"]})
    notes = BatchNotes(tmp_path)
    scorers: list[Scorer] = [Failing("b")]
    ScoringActor(scorers, torch.get_num_threads(), notes, kept)(rows)
    found = ScoredChunks(kept, ["number"]).find(rows["pair_id"])
    assert found is not None
    assert found["pair_id"].to_pylist() == ["a"]
    found = ScoredChunks(kept, ["number"]).find(rows["pair_id"], with_failed=True)
    assert found is not None
    assert found["pair_id"].to_pylist() == ["a", "b"]
    again = ScoringActor([Failing("none")], torch.get_num_threads(), notes, kept)(rows)
    assert again["reason"].to_pylist() == [None, None]
    found = ScoredChunks(kept, ["number"]).find(pa.chunked_array([["b"]]), with_failed=True)
    assert found is not None
    assert found["reason"].to_pylist() == [None]

    scorers = [Constant([2.0, math.nan])]
    ScoringActor(scorers, torch.get_num_threads(), notes, tmp_path / "nan")(rows)
    names = ["chosen_reward", "rejected_reward"]
    found = ScoredChunks(tmp_path / "nan", names).find(rows["pair_id"])
    assert found is not None
    assert found["reason"].to_pylist() == [None, "rejected_reward is nan"]


class Refusing(Failing):
    def __call__(self, rows: pa.Table) -> np.ndarray:
        raise UserError("no chat template")


def test_refusal_is_not_about_a_pair() -> None:
    with pytest.raises(UserError, match="no chat template"):
        score_or_explain(Refusing("b"), pa.table({"pair_id": ["a", "b"]}))
