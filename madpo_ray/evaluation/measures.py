"""What a training did to preferences, in numbers: accuracies and rank correlations.

Legend: P pairs.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from scipy.stats import spearmanr

from madpo_ray.columns import GROUP_HASH, MARGIN, POLICY_LOGPS, REF_LOGPS
from madpo_ray.scoring.calibration import are_right, grouped_interval
from madpo_ray.scoring.report import accuracy_by_margin

BINS = 5


def preference_metrics(scored: pa.Table, score_columns: Sequence[str] = ()) -> dict[str, Any]:
    """Accuracies with 95 % intervals, per way to rank the two responses of a pair.

    A tie counts one half. Intervals take pairs of one group (by default, one prompt) as dependent.

    `reference` and `policy` rank by the log-prob of the complete response, `implicit` by the
    policy's log-ratio to the reference, `reward_model` by its margin, if there is one.

    Args:
        scored: pairs with reference and policy log-probs, and perhaps margins.
        score_columns: true scores of chosen and rejected; if given, Spearman's rank correlation
            with the true margin is measured, too.
    """
    # Chosen minus rejected, by each way to rank.
    reference = _difference(scored, REF_LOGPS)
    policy = _difference(scored, POLICY_LOGPS)
    rankings = {"reference": reference, "policy": policy, "implicit": policy - reference}
    if MARGIN in scored.column_names:
        rankings["reward_model"] = scored[MARGIN].to_numpy()
    true_margin = _difference(scored, score_columns) if score_columns else None
    groups = scored[GROUP_HASH].to_numpy()

    # How often each is right, and how well it follows the true margin.
    metrics: dict[str, Any] = {"test_pairs": scored.num_rows}
    for name, differences in rankings.items():
        right = are_right(differences)
        metrics[name] = {
            "accuracy": float(right.mean()),
            "accuracy_interval": grouped_interval(right, groups),
        }
        if true_margin is not None:
            metrics[name] |= rank_correlation(differences, true_margin)
    if MARGIN in scored.column_names:
        margins = scored[MARGIN].to_numpy()
        metrics["implicit"]["by_margin"] = accuracy_by_margin(
            margins, policy - reference, BINS, groups
        )
    return metrics


def rank_correlation(differences: np.ndarray, true_margin: np.ndarray) -> dict[str, Any]:
    """Spearman's rank correlation of two (P,); None, with a reason, if there is none."""
    is_known = np.isfinite(true_margin) & np.isfinite(differences)
    result: dict[str, Any] = {"pairs_without_score": int((~is_known).sum())}
    known, true = differences[is_known], true_margin[is_known]
    if len(known) < 2:
        return {**result, "rank_correlation": None, "reason": "fewer than two pairs have a score"}
    if np.ptp(known) == 0 or np.ptp(true) == 0:
        return {**result, "rank_correlation": None, "reason": "all pairs have the same value"}
    return {**result, "rank_correlation": float(spearmanr(known, true).statistic)}


def _difference(table: pa.Table, names: Sequence[str]) -> np.ndarray:
    """Chosen minus rejected, (P,)."""
    chosen, rejected = names
    difference: np.ndarray = table[chosen].to_numpy() - table[rejected].to_numpy()
    return difference
