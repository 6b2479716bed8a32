"""Means, win rates, lengths and variety on hand-made cases whose answer is known."""

import numpy as np
import pytest
from scipy.special import expit

from madpo_ray.evaluation.comparisons import (
    distinct_ngrams,
    length_controlled_win_rate,
    mean_with_interval,
    on_frontier,
    win_rate,
    wins_of,
)
from madpo_ray.scoring.calibration import interval


def test_mean_of_prompts_with_interval() -> None:
    """200 prompts with a standard deviation of 1: the interval is 1.96 / sqrt(200) wide."""
    values = np.random.default_rng(0).normal(3.0, 1.0, (200, 1))
    found = mean_with_interval(values)
    low, high = found["interval"]
    assert found["mean"] == pytest.approx(values.mean())
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 200**0.5, rel=0.1)


def test_samples_of_a_prompt_are_one_observation() -> None:
    """Repeating every sample ten times makes nothing more certain."""
    values = np.random.default_rng(0).normal(size=(50, 1))
    once, often = (mean_with_interval(values.repeat(n, axis=1)) for n in (1, 10))
    assert often["interval"] == pytest.approx(once["interval"])


def test_equal_values_have_no_interval() -> None:
    assert mean_with_interval(np.ones((3, 2))) == {"mean": 1.0, "interval": (1.0, 1.0)}
    assert mean_with_interval(np.ones((1, 2)))["interval"] is None  # one prompt


def test_wins_everywhere_are_not_certain() -> None:
    """Sixteen of sixteen: Wilson's interval."""
    found = win_rate(np.ones((16, 2)), np.zeros((16, 2)))
    assert found == {"mean": 1.0, "interval": interval(16, 16)}
    assert found["interval"][0] < 0.82


def test_ties_are_half_a_win() -> None:
    ours, theirs = np.array([[1.0, 2.0]]), np.array([[1.0, 1.0]])
    assert wins_of(ours, theirs).tolist() == [[0.5, 1.0]]
    assert win_rate(ours, theirs)["mean"] == 0.75
    assert win_rate(theirs, ours)["mean"] == 0.25


def test_length_explains_wins() -> None:
    """A judge that likes length only: at equal length nobody wins."""
    rng = np.random.default_rng(0)
    longer_by = rng.normal(10.0, 20.0, (4000, 1))
    liking = expit(3 * np.tanh(longer_by / longer_by.std()))
    wins = (rng.random((4000, 1)) < liking).astype(float)
    assert wins.mean() > 0.6
    assert length_controlled_win_rate(wins, longer_by) == pytest.approx(0.5, abs=0.04)


def test_without_lengths_nothing_is_controlled() -> None:
    wins = np.array([[1.0], [0.0], [1.0], [0.5]])
    assert length_controlled_win_rate(wins, np.zeros((4, 1))) == 0.625
    assert length_controlled_win_rate(np.ones((4, 1)), np.arange(4.0)[:, None]) == 1.0


def test_constant_difference_in_length_cannot_be_controlled() -> None:
    """Nothing tells what wins would be at equal length."""
    wins = np.array([[1.0], [0.0], [1.0], [0.5]])
    assert length_controlled_win_rate(wins, np.full((4, 1), 3.0)) is None


def test_lengths_may_separate_wins_from_losses() -> None:
    wins = np.array([[1.0], [1.0], [0.0], [0.0]])
    longer_by = np.array([[3.0], [2.0], [-2.0], [-3.0]])
    assert length_controlled_win_rate(wins, longer_by) == pytest.approx(0.5, abs=1e-3)


def test_distinct_ngrams() -> None:
    """Unigrams 1 2 1 2: two of four; bigrams 12 21 12: two of three."""
    assert distinct_ngrams([[1, 2, 1, 2]], 1) == 0.5
    assert distinct_ngrams([[1, 2, 1, 2]], 2) == pytest.approx(2 / 3)
    assert distinct_ngrams([[1]], 2) == 0.0


def test_frontier() -> None:
    """Costs 0, 1, 2, 2 and gains 0, 2, 1, 3: the third is worse than the second."""
    assert on_frontier([0, 1, 2, 2], [0, 2, 1, 3]) == [True, True, False, True]
    assert on_frontier([1, 1], [1, 1]) == [True, True]
    assert on_frontier([], []) == []
