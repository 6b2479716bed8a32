"""The formulas: values worked by hand, the properties that follow from them, and gradients."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from madpo_ray.losses import (
    BetaStatistics,
    beta_dpo_batch,
    beta_dpo_loss,
    bradley_terry_loss,
    dpo_loss,
    ipo_loss,
    madpo_loss,
    madpo_weight,
)

Setting = dict[str, float]

TAU = math.log(0.999 / 0.001)
PAPER = {"c_max": 4.0, "c_min": 0.25, "lmbda": 1.0, "tau": TAU}
settings = st.fixed_dictionaries(
    {
        "c_max": st.floats(1.05, 8),
        "c_min": st.floats(0.05, 0.95),
        "lmbda": st.floats(0.2, 5),
        "tau": st.floats(0.2, 10),
    }
)
shares = st.floats(0.02, 0.98)


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def amplifier(h: Tensor, c_max: float, c_min: float, lmbda: float, tau: float) -> Tensor:
    """c(h) of the authors' code, as they wrote it."""
    ratio = (c_max - 1) / (1 - c_min)
    return c_min + (c_max - c_min) / (1 + ratio * torch.exp(lmbda * (h.abs() - tau)))


@pytest.mark.parametrize(
    ("margin", "weight"),
    [
        (-0.5, 0.32),
        (-1.0, 0.070),
        (-2.0, 0.0035),
        (-4.05, 9e-5),
        (0.0, 1.0),
        (TAU, 1.0),
        (-7.0, 1.0),
        (-60.0, 1.0),
    ],
)
def test_weights_of_the_paper(margin: float, weight: float) -> None:
    assert madpo_weight(f64(margin), **PAPER).item() == pytest.approx(weight, rel=0.03)


def test_weight_by_hand() -> None:
    c = 0.25 + 3.75 / (1 + 4 * math.exp(1 - TAU))
    by_hand = (1 / (1 + math.exp(c))) / (1 / (1 + math.e))
    assert madpo_weight(f64(-1.0), **PAPER).item() == pytest.approx(by_hand, rel=1e-12)
    assert by_hand == pytest.approx(0.0696, abs=5e-5)


def test_weight_is_the_plain_quotient() -> None:
    """If that is finite."""
    h = torch.linspace(-30, 30, 601, dtype=torch.float64)
    plain = torch.sigmoid(amplifier(h, **PAPER) * h) / torch.sigmoid(h)
    expected = torch.where(h > -TAU, plain, 1.0)
    torch.testing.assert_close(madpo_weight(h, **PAPER), expected, rtol=1e-10, atol=0)


def test_largest_weight_of_the_paper() -> None:
    weights = madpo_weight(torch.linspace(0, 7, 7001, dtype=torch.float64), **PAPER)
    assert weights.max().item() == pytest.approx(1.42, abs=5e-3)


@given(settings)
def test_weight_is_one_at_zero_and_tau(setting: Setting) -> None:
    """And continuous at -tau."""
    tau = setting["tau"]
    assert amplifier(f64(tau), **setting).item() == pytest.approx(1.0, rel=1e-12)
    just_inside = -tau * (1 - 1e-9)
    weights = madpo_weight(f64(0.0, tau, -tau, just_inside), **setting)
    expected = torch.ones(4, dtype=torch.float64)
    torch.testing.assert_close(weights, expected, rtol=0, atol=1e-6)


@given(settings, shares)
def test_weight_amplifies_and_dampens(setting: Setting, share: float) -> None:
    """Above 1 on (0, tau), below 1 on (-tau, 0) and above tau, 1 below -tau."""
    tau = setting["tau"]
    margins = f64(share * tau, -share * tau, tau + share)
    inside, negative, above = madpo_weight(margins, **setting)
    assert inside > 1
    assert negative < 1
    assert above < 1
    assert madpo_weight(f64(-tau - share), **setting).item() == 1


@given(settings, st.lists(st.floats(-100, 100), min_size=1, max_size=20))
def test_weight_is_between_zero_and_two(setting: Setting, margins: list[float]) -> None:
    weight = madpo_weight(f64(*margins), **setting)
    assert bool(((weight >= 0) & (weight < 2)).all())


@given(settings, shares)
def test_calibrated_margins_have_mean_weight_one(setting: Setting, share: float) -> None:
    """Inside tau: a pair of margin h is labelled h with probability sigmoid(h), else -h.

    E[w] = sigmoid(ch) + sigmoid(-ch) = 1.
    """
    h = f64(share * setting["tau"], -share * setting["tau"])
    mean = (torch.sigmoid(h) * madpo_weight(h, **setting)).sum().item()
    assert mean == pytest.approx(1.0, rel=1e-9)


@pytest.mark.parametrize("factor", [0.5, 1.0, 2.0, 4.0])
def test_mean_weight_shows_a_wrong_scale(factor: float) -> None:
    generator = torch.Generator().manual_seed(0)
    true = torch.randn(200_000, generator=generator, dtype=torch.float64).abs()
    both = torch.cat([true, -true])
    weight = madpo_weight(factor * both, **PAPER)
    mean = (torch.sigmoid(both) * weight).sum().item() / len(true)
    assert (mean > 1.02) == (factor < 1)
    assert (mean < 0.98) == (factor > 1)


def test_optimum_is_the_amplified_margin() -> None:
    """w(h) s(h) log s(z) + w(-h) s(-h) log s(-z) is largest at s(z) = the first weight's share."""
    h = f64(0.3, 1.0, 2.5, 5.0)
    up = madpo_weight(h, **PAPER) * torch.sigmoid(h)
    down = madpo_weight(-h, **PAPER) * torch.sigmoid(-h)
    optimum = torch.logit(up / (up + down))
    torch.testing.assert_close(optimum, amplifier(h, **PAPER) * h, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_extreme_inputs_stay_finite(dtype: torch.dtype) -> None:
    margin = torch.tensor([-60.0, -6.9, 0.0, 6.9, 60.0], dtype=dtype)
    logratio = torch.tensor([800.0, -800.0, 0.0, 60.0, -60.0], dtype=dtype, requires_grad=True)
    loss = madpo_loss(logratio, margin, beta=0.1, **PAPER)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert bool(loss.isfinite().all())
    loss.sum().backward()
    assert logratio.grad is not None
    assert bool(logratio.grad.isfinite().all())


@pytest.mark.parametrize(
    "bad", [{"c_min": 1.0}, {"c_max": 1.0}, {"c_min": 0.0}, {"tau": 0.0}, {"lmbda": 0.0}]
)
def test_refuses_settings_that_divide_by_zero(bad: Setting) -> None:
    with pytest.raises(ValueError, match="c_min"):
        madpo_weight(f64(1.0), **{**PAPER, **bad})


def test_losses_by_hand() -> None:
    ten = f64(10.0)
    agree = math.log(1 + math.exp(-1))
    disagree = math.log(1 + math.e)
    expected = {
        dpo_loss(f64(0.0), beta=0.1): math.log(2),
        dpo_loss(ten, beta=0.1): agree,
        dpo_loss(ten, beta=0.1, label_smoothing=0.1): 0.9 * agree + 0.1 * disagree,
        ipo_loss(f64(3.0), beta=0.1): 4.0,
    }
    for loss, value in expected.items():
        assert loss.item() == pytest.approx(value, rel=1e-12)
    assert bradley_terry_loss(f64(1.0), f64(0.0)).item() == pytest.approx(0.313262, abs=1e-6)
    assert madpo_loss(ten, f64(-1.0), beta=0.1, **PAPER).item() == pytest.approx(0.0218, abs=5e-5)


@pytest.mark.parametrize(
    "call",
    [
        lambda: bradley_terry_loss(torch.zeros(3), torch.zeros(3, 1)),
        lambda: madpo_loss(torch.zeros(3), torch.zeros(3, 1), beta=0.1, **PAPER),
        lambda: madpo_loss(torch.zeros(3), torch.zeros(2), beta=0.1, **PAPER),
        lambda: dpo_loss(torch.zeros(2, 2), beta=0.1),
    ],
)
def test_refuses_shapes_that_broadcast(call: Callable[[], Tensor]) -> None:
    with pytest.raises(ValueError, match="one length"):
        call()


def test_gradients_in_float64() -> None:
    generator = torch.Generator().manual_seed(1)
    logratio = torch.randn(6, dtype=torch.float64, generator=generator).requires_grad_()
    margin = f64(-9.0, -2.0, -0.1, 0.5, 3.0, 9.0)
    losses: list[Callable[[Tensor], Tensor]] = [
        lambda x: madpo_loss(x, margin, beta=0.3, **PAPER),
        lambda x: dpo_loss(x, beta=0.3, label_smoothing=0.2),
        lambda x: ipo_loss(x, beta=0.3),
        lambda x: bradley_terry_loss(x, margin),
        lambda x: beta_dpo_loss(x, beta=torch.tensor(0.3, dtype=torch.float64)),
    ]
    for loss in losses:
        assert torch.autograd.gradcheck(loss, (logratio,))


def test_weight_carries_no_gradient() -> None:
    margin = f64(1.0).requires_grad_()
    assert not madpo_loss(f64(1.0), margin, beta=0.1, **PAPER).requires_grad


def test_dpo_is_torchs_logsigmoid() -> None:
    x = torch.linspace(-5, 5, 11)
    torch.testing.assert_close(dpo_loss(x, beta=2.0), -F.logsigmoid(2 * x))


def gaps_statistics(mean: float, std: float) -> BetaStatistics:
    return BetaStatistics(torch.tensor(mean), torch.tensor(std))


def test_beta_dpo_follows_the_published_code() -> None:
    gaps = f64(0.0, 1.0, 2.0, 3.0, 4.0)
    statistics = gaps_statistics(0.0, 0.0).updated(gaps)
    assert statistics.mean.item() == pytest.approx(0.2)
    assert statistics.std.item() == pytest.approx(0.1 * math.sqrt(2.5))
    generator = torch.Generator().manual_seed(0)
    beta, kept = beta_dpo_batch(
        gaps, statistics, beta=0.1, a=0.6, mode_weight=0.2, generator=generator
    )
    assert int(kept.sum()) == 4
    expected = 0.1 * (1 + 0.6 * (gaps[kept].mean().item() - 0.2))
    assert beta.item() == pytest.approx(expected)


def test_beta_dpo_keeps_the_integer_part() -> None:
    """int(7 * 0.8) = 5, not round(5.6) = 6."""
    _, kept = beta_dpo_batch(
        torch.arange(7.0),
        gaps_statistics(3.0, 1.0),
        beta=0.1,
        a=0.6,
        mode_weight=0.2,
        generator=torch.Generator().manual_seed(0),
    )
    assert int(kept.sum()) == 5


def test_beta_dpo_draws_by_density() -> None:
    gaps = f64(0.0, 3.0)
    statistics = gaps_statistics(0.0, 1.0)
    generator = torch.Generator().manual_seed(0)
    counts = torch.zeros(2)
    for _ in range(4000):
        _, kept = beta_dpo_batch(
            gaps, statistics, beta=0.1, a=0.6, mode_weight=0.5, generator=generator
        )
        counts += kept
    expected = 1 / (1 + math.exp(-4.5))
    assert (counts[0] / 4000).item() == pytest.approx(expected, abs=0.01)


def test_beta_dpo_prefers_the_nearer_of_two_outliers() -> None:
    """At 50 and 60 standard deviations every plain density is 0 in float32."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        _, kept = beta_dpo_batch(
            f64(50.0, 60.0),
            gaps_statistics(0.0, 1.0),
            beta=0.1,
            a=0.6,
            mode_weight=0.5,
            generator=generator,
        )
        assert kept.tolist() == [True, False]


@pytest.mark.parametrize(
    "gaps", [f64(0.0, 0.0, 0.0), f64(1.0), f64(1.0, math.nan), f64(1.0, math.inf)]
)
def test_beta_dpo_keeps_all_without_statistics(gaps: Tensor) -> None:
    """The published code gives NaN there."""
    statistics = gaps_statistics(0.0, 0.0).updated(gaps)
    beta, kept = beta_dpo_batch(
        gaps, statistics, beta=0.1, a=0.6, mode_weight=0.2, generator=torch.Generator()
    )
    assert beta.item() == pytest.approx(0.1)
    assert bool(kept.all())


def test_beta_dpo_has_a_floor() -> None:
    beta, _ = beta_dpo_batch(
        f64(0.0, 1.0),
        gaps_statistics(1000.0, 1.0),
        beta=0.1,
        a=0.6,
        mode_weight=0.0,
        generator=torch.Generator(),
    )
    assert beta.item() == pytest.approx(1e-3)


MATRIX = torch.zeros(2, 2)


@pytest.mark.parametrize(
    "call",
    [
        lambda: madpo_weight(MATRIX, **PAPER),
        lambda: ipo_loss(MATRIX, beta=0.1),
        lambda: beta_dpo_batch(MATRIX, statistics(0.0, 0.0), generator=generator(), **BETA_DPO),
    ],
)
def test_refuses_matrices(call: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match="one length"):
        call()


BETA_DPO = {"beta": 0.1, "a": 0.6, "mode_weight": 0.5}


def statistics(mean: float, std: float) -> BetaStatistics:
    return BetaStatistics(torch.tensor(mean), torch.tensor(std))


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_beta_statistics_carry_no_gradient() -> None:
    updated = statistics(0.0, 0.0).updated(torch.tensor([1.0, 2.0, 4.0]).requires_grad_())
    assert not updated.mean.requires_grad
    assert not updated.std.requires_grad


def test_beta_dpo_of_one_pair_keeps_it() -> None:
    """Also where statistics could draw. In the gaps' own precision."""
    gaps = f64(5.0)
    settings = {**BETA_DPO, "mode_weight": 0.0}
    beta, kept = beta_dpo_batch(gaps, statistics(0.0, 1.0), generator=generator(), **settings)
    assert beta.item() == 0.1
    assert kept.tolist() == [True]


def test_beta_dpo_keeps_what_is_near_the_mean() -> None:
    """Not what is near its negative."""
    gaps = torch.tensor([0.0, 3.0])
    for seed in range(20):
        draw = torch.Generator().manual_seed(seed)
        _, kept = beta_dpo_batch(gaps, statistics(3.0, 0.5), generator=draw, **BETA_DPO)
        assert kept.tolist() == [False, True]


def test_two_gaps_have_a_standard_deviation() -> None:
    updated = statistics(0.0, 0.0).updated(torch.tensor([1.0, 3.0]))
    assert updated.mean.item() == pytest.approx(0.1 * 2)
    assert updated.std.item() == pytest.approx(0.1 * math.sqrt(2))
