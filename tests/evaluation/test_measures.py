"""Accuracies and correlations on hand-made cases whose sign is known."""

import math

import numpy as np
import pyarrow as pa
import pytest

from madpo_ray.evaluation.measures import preference_metrics
from madpo_ray.scoring.report import accuracy_by_margin

TABLE = pa.table(
    {
        "ref_chosen_logps": [-1.0, -3.0, -2.0, -2.0],
        "ref_rejected_logps": [-2.0, -1.0, -2.0, -4.0],  # differences 1, -2, 0, 2
        "policy_chosen_logps": [-1.0, -1.0, -2.0, -5.0],
        "policy_rejected_logps": [-3.0, -2.0, -3.0, -4.0],  # differences 2, 1, 1, -1
        "margin": [3.0, 2.0, 1.0, -1.0],
        "chosen_score": [3.0, 2.0, 1.0, 0.0],
        "rejected_score": [0.0, 0.0, 0.0, 1.0],  # differences 3, 2, 1, -1
        "group_hash": [1, 2, 3, 4],
    }
)


def test_accuracies_by_hand() -> None:
    """implicit: differences 1, 3, 1, -3."""
    metrics = preference_metrics(TABLE)
    accuracies = {
        name: ranking["accuracy"] for name, ranking in metrics.items() if name != "test_pairs"
    }
    assert accuracies == {
        "reference": 0.625,  # one tie
        "policy": 0.75,
        "implicit": 0.75,
        "reward_model": 0.75,
    }
    low, high = metrics["reference"]["accuracy_interval"]
    assert (low, high) == pytest.approx((0.2194, 0.9081), abs=1e-3)
    assert metrics["test_pairs"] == 4


def test_pairs_that_occur_twice_make_no_interval_narrower() -> None:
    once = preference_metrics(TABLE)
    twice = preference_metrics(pa.concat_tables([TABLE, TABLE]))
    for name in ("reference", "policy", "implicit", "reward_model"):
        assert twice[name]["accuracy"] == once[name]["accuracy"]
        # Kish's count is 3 of 4 here: variances of so few groups have the factor 4 / 3.
        low, high = twice[name]["accuracy_interval"]
        assert low <= once[name]["accuracy_interval"][0]
        assert high >= once[name]["accuracy_interval"][1]


def test_correlations_by_hand() -> None:
    """With true margins 3, 2, 1, -1: ranks 4, 3, 2, 1."""
    metrics = preference_metrics(TABLE, ("chosen_score", "rejected_score"))
    # Ranks of the reference: 3, 1, 2, 4; sum d^2 = 1 + 4 + 0 + 9 = 14; 1 - 6 * 14 / 60.
    assert metrics["reference"]["rank_correlation"] == pytest.approx(-0.4)
    assert metrics["reward_model"]["rank_correlation"] == pytest.approx(1.0)


def test_ties_count_one_half() -> None:
    table = TABLE.set_column(4, "margin", pa.array([0.0, 2.0, 0.0, -1.0]))
    assert preference_metrics(table)["reward_model"]["accuracy"] == 0.5


def test_pairs_without_a_true_score_are_left_out() -> None:
    """And counted; the correlation is that of the others."""
    scores = pa.array([math.nan, 2.0, 1.0, 0.0])
    table = TABLE.set_column(5, "chosen_score", scores)
    found = preference_metrics(table, ("chosen_score", "rejected_score"))["reward_model"]
    assert (found["rank_correlation"], found["pairs_without_score"]) == (pytest.approx(1.0), 1)


@pytest.mark.parametrize(
    ("chosen", "reason"),
    [
        ([1.0, 1.0, 1.0, 2.0], "all pairs have the same value"),
        ([math.nan, math.nan, math.nan, 1.0], "fewer than two pairs have a score"),
    ],
)
def test_undefined_correlation_has_a_reason(chosen: list[float], reason: str) -> None:
    table = TABLE.set_column(5, "chosen_score", pa.array(chosen))
    found = preference_metrics(table, ("chosen_score", "rejected_score"))["policy"]
    assert found["rank_correlation"] is None
    assert found["reason"] == reason


def test_without_margins_there_is_no_reward_model() -> None:
    assert "reward_model" not in preference_metrics(TABLE.drop_columns(["margin"]))


def test_accuracy_by_size_of_the_margin() -> None:
    """Margins 3, 2, 1, -1 in two bins; implicit differences 1, 3, 1, -3."""
    small, large = accuracy_by_margin(
        np.array([3.0, 2.0, 1.0, -1.0]), np.array([1.0, 3.0, 1.0, -3.0]), bins=2
    )
    assert (small["from"], small["to"], small["accuracy"]) == (1.0, 1.0, 0.5)
    assert (large["from"], large["to"], large["accuracy"]) == (2.0, 3.0, 1.0)
    assert len(preference_metrics(TABLE)["implicit"]["by_margin"]) == 4


def test_implicit_reward_is_a_difference() -> None:
    """Both rank the pair right, and the policy has come nearer to the rejected response."""
    table = pa.table(
        {
            "ref_chosen_logps": [-1.0],
            "ref_rejected_logps": [-3.0],
            "policy_chosen_logps": [-1.0],
            "policy_rejected_logps": [-2.0],
            "group_hash": [0],
        }
    )
    metrics = preference_metrics(table)
    accuracies = {name: metrics[name]["accuracy"] for name in ("reference", "policy", "implicit")}
    assert accuracies == {"reference": 1.0, "policy": 1.0, "implicit": 0.0}


def test_two_scored_pairs_have_a_correlation() -> None:
    table = TABLE.set_column(5, "chosen_score", pa.array([math.nan, math.nan, 1.0, 0.0]))
    found = preference_metrics(table, ("chosen_score", "rejected_score"))["reward_model"]
    assert found["rank_correlation"] == pytest.approx(1.0)


def test_constant_margins_have_no_correlation() -> None:
    table = TABLE.set_column(4, "margin", pa.array([1.0] * 4))
    found = preference_metrics(table, ("chosen_score", "rejected_score"))["reward_model"]
    assert found["rank_correlation"] is None
    assert found["reason"] == "all pairs have the same value"
