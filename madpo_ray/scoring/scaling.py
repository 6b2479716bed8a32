"""What makes margins calibrated: a temperature, or an increasing function of any shape.

A margin h is calibrated if sigmoid(h) is the share of such pairs whose label agrees. Rows are
chosen-oriented, so a pair's label agrees if its margin is positive.

Legend: N pairs.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import isotonic_regression, minimize_scalar
from scipy.special import log_expit, logit

Margins = NDArray[np.float64]
Method = Literal["temperature", "isotonic", "none"]
# A fit that ends at these bounds has no optimum inside: the margins have one sign only, or are
# worse than chance.
TEMPERATURE_BOUNDS = (1e-3, 1e3)


@dataclass(frozen=True)
class Scaling:
    """An odd, increasing function of margins; by default it changes nothing.

    Attributes:
        temperature: what margins are divided by.
        knots: instead, (|margin|, calibrated |margin|) from 0 on, between which lines are drawn.
            Beyond the last the function is constant.
    """

    temperature: float = 1.0
    knots: tuple[tuple[float, float], ...] = ()

    def __call__(self, margins: Margins) -> Margins:
        """Calibrated margins (N,) of margins (N,)."""
        if not self.knots:
            return margins / self.temperature
        sizes, calibrated = zip(*self.knots, strict=True)
        scaled: Margins = np.sign(margins) * np.interp(np.abs(margins), sizes, calibrated)
        return scaled


def fit_scaling(margins: Margins, method: Method) -> Scaling | None:
    """The scaling that fits margins (N,) best; None if there is none."""
    if method == "none":
        return Scaling()
    if method == "isotonic":
        knots = fit_isotonic(margins)
        return None if knots is None else Scaling(knots=knots)
    temperature = fit_temperature(margins)
    return None if temperature is None else Scaling(temperature)


def fit_temperature(margins: Margins) -> float | None:
    """The T that minimises mean -log sigmoid(margin / T), for margins (N,).

    Source: Guo et al. 2017, for two classes. None if no finite T does.
    """
    num_wrong = np.sum(margins < 0)  # a tie says nothing of T
    if num_wrong == 0 or np.sum(margins > 0) <= num_wrong:
        return None
    low, high = np.log(TEMPERATURE_BOUNDS)
    found = minimize_scalar(
        lambda log_t: -np.mean(log_expit(margins / np.exp(log_t))),
        bounds=(low, high),
        method="bounded",
    )
    is_inside = low + 0.01 < found.x < high - 0.01
    return float(np.exp(found.x)) if is_inside else None


def fit_isotonic(margins: Margins) -> tuple[tuple[float, float], ...] | None:
    """Knots of isotonic regression (Zadrozny and Elkan 2002) of agreement on |margin| (N,).

    On chosen-oriented rows every label is 1, so the data are made symmetric: margin h with label 1,
    -h with 0. The fit is then odd in logits, and that of |h| with label h > 0, at least 1/2. Shares
    are those of a block with one more pair of either label, so that logits are finite. None if no
    share is above 1/2.
    """
    if len(margins) == 0:
        return None
    labels = np.where(margins == 0, 0.5, margins > 0)

    # Pairs of one size have one share.
    sizes, place, counts = np.unique(np.abs(margins), return_inverse=True, return_counts=True)
    means = np.bincount(place, labels) / counts
    shares = isotonic_regression(means, weights=counts).x

    # One knot for each block of equal shares.
    starts = np.flatnonzero(np.diff(shares, prepend=-1.0) > 0)
    in_block = np.add.reduceat(counts, starts)
    centers = np.add.reduceat(sizes * counts, starts) / in_block
    smoothed = (shares[starts] * in_block + 1) / (in_block + 2)
    logits = np.maximum.accumulate(np.maximum(logit(smoothed), 0.0))
    if logits[-1] == 0:
        return None
    first = [(0.0, 0.0)] if centers[0] > 0 else []
    return tuple(first + list(zip(centers.tolist(), logits.tolist(), strict=True)))
