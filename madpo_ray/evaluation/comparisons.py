"""Samples of a policy in numbers: rewards, win rates, lengths, diversity, and the frontier.

Legend: Q prompts, K samples of each. Samples of one prompt are alike, so every interval is over
prompts: their means are drawn again with replacement.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import expit
from scipy.stats import bootstrap

from madpo_ray.scoring.calibration import interval

RESAMPLES = 2000
# Keeps the slope of the length finite if lengths alone separate wins from losses.
SLOPE_PENALTY = 1e-3

Values = NDArray[np.float64]


def by_prompt(column: pa.ChunkedArray, num_prompts: int) -> Values:
    """Values of samples, all prompts once and then again, as (Q, K)."""
    values: Values = column.to_numpy().astype(np.float64).reshape(-1, num_prompts).T
    return values


def mean_with_interval(values: Values) -> dict[str, Any]:
    """Mean of values (Q, K), Q > 0, and its 95 % percentile bootstrap interval over prompts.

    No interval for a single prompt.
    """
    per_prompt = values.mean(axis=1)
    mean = float(per_prompt.mean())
    if len(per_prompt) < 2:
        return {"mean": mean, "interval": None}
    if np.ptp(per_prompt) == 0:
        return {"mean": mean, "interval": (mean, mean)}
    found = bootstrap(
        (per_prompt,), np.mean, n_resamples=RESAMPLES, method="percentile", rng=0, vectorized=True
    ).confidence_interval
    return {"mean": mean, "interval": (float(found.low), float(found.high))}


def win_rate(ours: Values, theirs: Values) -> dict[str, Any]:
    """How often our rewards (Q, K) are above theirs, with its interval. A tie counts one half.

    If all prompts agree, nothing would vary in a bootstrap: Wilson's interval.
    """
    wins = wins_of(ours, theirs)
    found = mean_with_interval(wins)
    if len(wins) > 1 and np.ptp(wins.mean(axis=1)) == 0:
        found["interval"] = interval(found["mean"] * len(wins), len(wins))
    return found


def wins_of(ours: Values, theirs: Values) -> Values:
    """1 for a win, 0 for a loss, 0.5 for a tie, (Q, K)."""
    wins: Values = np.where(ours == theirs, 0.5, (ours > theirs).astype(np.float64))
    return wins


def length_controlled_win_rate(wins: Values, longer_by: Values) -> float | None:
    """The win rate if both responses were equally long.

    The intercept of a logistic regression of wins (Q, K) on tanh of the difference in length, in
    its standard deviations (Dubois et al. 2024, without their terms for models and instructions).

    Args:
        longer_by: tokens that our responses have more than theirs, (Q, K).

    Returns None if all are longer, or shorter, by the same: nothing tells what length does then.
    """
    rate = float(wins.mean())
    deviation = longer_by.std()
    if deviation == 0 and longer_by.any():
        return None
    if deviation == 0 or rate in (0.0, 1.0):
        return rate
    length = np.tanh(longer_by / deviation)

    def loss(parameters: Values) -> float:
        intercept, slope = parameters
        logits = intercept + slope * length
        # -log sigmoid(logit) for a win, -log sigmoid(-logit) for a loss.
        nll = wins * np.logaddexp(0, -logits) + (1 - wins) * np.logaddexp(0, logits)
        return float(nll.mean() + SLOPE_PENALTY * slope**2)

    return float(expit(minimize(loss, np.zeros(2)).x[0]))


def distinct_ngrams(responses: Sequence[Sequence[int]], n: int) -> float:
    """Share of different n-grams among all n-grams of token ids; 0 without any.

    Li et al. 2016 divide by the number of tokens; of n-grams there are fewer, so that 1 is reached.
    """
    grams = [tuple(ids[i : i + n]) for ids in responses for i in range(max(0, len(ids) - n + 1))]
    return len(set(grams)) / len(grams) if grams else 0.0


def on_frontier(costs: Sequence[float], gains: Sequence[float]) -> list[bool]:
    """Whether no other point has at most the cost and at least the gain, and one of both better."""
    points = list(zip(costs, gains, strict=True))
    return [
        not any(
            other_cost <= cost and other_gain >= gain and (other_cost, other_gain) != (cost, gain)
            for other_cost, other_gain in points
        )
        for cost, gain in points
    ]
