"""What makes margins calibrated."""

import numpy as np
import pytest
from scipy.special import expit, logit
from sklearn.isotonic import IsotonicRegression

from madpo_ray.scoring.scaling import Scaling, fit_isotonic, fit_scaling


def test_nothing_changes_by_default() -> None:
    margins = np.array([-2.0, 0.0, 3.5])
    assert Scaling()(margins).tolist() == margins.tolist()


def test_temperature_divides() -> None:
    assert Scaling(2.0)(np.array([-3.0, 1.0])).tolist() == [-1.5, 0.5]


def test_knots_are_joined_by_lines_and_odd() -> None:
    scaling = Scaling(knots=((0.0, 0.0), (1.0, 2.0), (3.0, 2.5)))
    margins = np.array([-2.0, -0.5, 0.0, 0.5, 1.0, 2.0, 9.0])
    assert scaling(margins).tolist() == [-2.25, -1.0, 0.0, 1.0, 2.0, 2.25, 2.5]


def test_isotonic_by_hand() -> None:
    """Sizes 1, 2, 3, 4 with labels 1, 0, 1, 1: blocks (1, 2) at 1/2 and (3, 4) at 1.

    With one more pair of either label, 2/4 and 3/4: logits 0 and ln 3.
    """
    knots = fit_isotonic(np.array([1.0, -2.0, 3.0, 4.0]))
    assert knots is not None
    assert knots[0] == (0.0, 0.0)
    assert knots[1] == (1.5, 0.0)
    assert knots[2] == (3.5, pytest.approx(np.log(3)))


def test_isotonic_of_ratings_does_not_depend_on_the_rows() -> None:
    """Pairs of one size have one share: that of all of them."""
    margins = np.repeat([1.0, -1.0, 2.0, -2.0, 3.0, -3.0], [61, 39, 75, 25, 90, 10])
    expected = [(0.0, 0.0), *zip([1.0, 2.0, 3.0], np.log([62 / 40, 76 / 26, 91 / 11]), strict=True)]
    for seed in range(3):
        shuffled = np.random.default_rng(seed).permutation(margins)
        knots = fit_isotonic(shuffled)
        assert knots is not None
        np.testing.assert_allclose(knots, expected)


def test_isotonic_is_that_of_symmetric_data() -> None:
    """Away from the ends, and but for the pairs that are added to each block."""
    rng = np.random.default_rng(0)
    sizes = rng.exponential(2.0, 5000)
    agrees = rng.random(5000) < expit(np.sqrt(sizes))
    margins = np.where(agrees, sizes, -sizes)
    scaling = fit_scaling(margins, "isotonic")
    assert scaling is not None

    both = np.concatenate([margins, -margins])
    labels = np.repeat([1.0, 0.0], 5000)
    theirs = IsotonicRegression(out_of_bounds="clip").fit(both, labels)
    at = np.linspace(0.5, 6, 30)
    expected = logit(theirs.predict(at))
    assert np.abs(scaling(at) - expected).mean() < 0.12
    assert np.abs(scaling(at) - np.sqrt(at)).mean() < 0.2  # the truth
    assert (np.diff(scaling(np.linspace(-9, 9, 500))) >= 0).all()


@pytest.mark.parametrize(
    "margins",
    [[], [-1.0], [0.0, 0.0], [2.0, -1.0, -3.0, -4.0]],
    ids=["none", "wrong", "ties", "bad"],
)
def test_isotonic_of_margins_that_say_nothing(margins: list[float]) -> None:
    assert fit_isotonic(np.array(margins)) is None


def test_perfect_model_has_finite_margins() -> None:
    knots = fit_isotonic(np.arange(1.0, 99.0))
    assert knots is not None
    assert knots[-1][1] == pytest.approx(np.log(99))
