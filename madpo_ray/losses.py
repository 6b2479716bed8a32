"""The maths: pure functions on (B,) tensors, chosen-oriented, without reduction.

Legend: B pairs. `logratio` is (logp_chosen - ref_logp_chosen) - (logp_rejected - ref_logp_rejected), summed over
response tokens; `margin` is the reward model's r(x, chosen) - r(x, rejected), in reward units. Every function returns
(B,), in float32, or in float64 where float64 comes in.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


def _exact(value: Tensor) -> Tensor:
    """At least float32: bfloat16 loses the tails that the weight lives in."""
    return value if value.dtype == torch.float64 else value.float()


def _same_shape(*values: Tensor) -> None:
    shapes = {tuple(value.shape) for value in values}
    if len(shapes) != 1 or len(next(iter(shapes))) != 1:
        raise ValueError(f"expected (B,) tensors of one length, got shapes {[tuple(value.shape) for value in values]}")


def madpo_weight(margin: Tensor, *, c_min: float, c_max: float, lmbda: float, tau: float) -> Tensor:
    """MADPO's weight of each pair.

    With R = (c_max - 1) / (1 - c_min) and c(h) = c_min + (c_max - c_min) / (1 + R exp(lmbda (|h| - tau))), the weight
    is w(h) = sigmoid(c(h) h) / sigmoid(h) where h > -tau, else 1. Source: `MADPOLoss` in the authors'
    `utils/loss_functions.py`.

    By hand, at c_max = 4, c_min = 0.25, lmbda = 1, tau = 6.907: R = 3 / 0.75 = 4. At h = -1, exp(1 - 6.907) =
    0.00272, so c = 0.25 + 3.75 / 1.01089 = 3.9596 and w = sigmoid(-3.9596) / sigmoid(-1) = 0.018715 / 0.268941 =
    0.0696. At h = 0 the weight is 1, at h = tau c = 0.25 + 3.75 / 5 = 1 and the weight is 1, at h = -7 it is 1 by
    definition.

    Raises:
        ValueError: unless 0 < c_min < 1 < c_max, lmbda > 0, tau > 0 (c_min = 1 or c_max = 1 is 0/0), or `margin` is
        not (B,).
    """
    if not (0 < c_min < 1 < c_max and lmbda > 0 and tau > 0):
        raise ValueError(f"need 0 < c_min < 1 < c_max, lmbda > 0, tau > 0; got {c_min=}, {c_max=}, {lmbda=}, {tau=}")
    _same_shape(margin)
    h = _exact(margin)
    steepness = (c_max - 1) / (1 - c_min)
    # exp overflows to inf for huge margins, where c tends to c_min: the quotient is then exactly 0, as it should be.
    c = c_min + (c_max - c_min) / (1 + steepness * torch.exp(lmbda * (h.abs() - tau)))
    inside = h > -tau
    # In logs, and with h made harmless outside: the plain quotient is 0/0 for very negative margins, and its NaN
    # survives a mask.
    h = torch.where(inside, h, 0.0)
    return torch.where(inside, torch.exp(F.logsigmoid(c * h) - F.logsigmoid(h)), 1.0)


def dpo_loss(logratio: Tensor, *, beta: float | Tensor, label_smoothing: float = 0.0) -> Tensor:
    """-log sigmoid(beta logratio): DPO (Rafailov et al. 2023, eq. 7); with label_smoothing cDPO (Mitchell 2023, eq. 3).

    By hand: logratio 0 gives ln 2 = 0.693147; logratio 10 at beta 0.1 gives ln(1 + exp(-1)) = 0.313262.
    """
    _same_shape(logratio)
    z = beta * _exact(logratio)
    return -F.logsigmoid(z) * (1 - label_smoothing) - F.logsigmoid(-z) * label_smoothing


def madpo_loss(
    logratio: Tensor, margin: Tensor, *, beta: float, c_min: float, c_max: float, lmbda: float, tau: float
) -> Tensor:
    """w(margin) * -log sigmoid(beta logratio); its plain mean is the objective, not divided by the sum of weights.

    Source: `MADPOLoss` of the authors. By hand: margin -1, logratio 10 at beta 0.1 and the setting of `madpo_weight`
    gives 0.0696 * 0.313262 = 0.0218.
    """
    _same_shape(logratio, margin)
    weight = madpo_weight(margin, c_min=c_min, c_max=c_max, lmbda=lmbda, tau=tau)
    return weight.detach() * dpo_loss(logratio, beta=beta)


def ipo_loss(z: Tensor, *, beta: float) -> Tensor:
    """(z - 1 / (2 beta))^2: IPO (Azar et al. 2023, eq. 17).

    `z` is the caller's: the difference of log-ratios each divided by its response's length (`ipo`, as TRL), or their
    plain difference (`ipo_sum`, as the MADPO authors). By hand: z = 3 at beta 0.1 gives (3 - 5)^2 = 4.
    """
    _same_shape(z)
    return (_exact(z) - 1 / (2 * beta)) ** 2


def bradley_terry_loss(chosen_reward: Tensor, rejected_reward: Tensor) -> Tensor:
    """-log sigmoid(chosen_reward - rejected_reward). By hand: rewards 1 and 0 give 0.313262."""
    _same_shape(chosen_reward, rejected_reward)
    return -F.logsigmoid(_exact(chosen_reward) - _exact(rejected_reward))


class BetaStatistics(NamedTuple):
    """Running mean and standard deviation of the gaps, both scalars."""

    mean: Tensor
    std: Tensor

    def updated(self, gaps: Tensor, momentum: float = 0.9) -> "BetaStatistics":
        """The next statistics: a moving average over the gaps (N,) of one batch of all ranks. One gap has no
        deviation."""
        if len(gaps) < 2:
            return self
        gaps = _exact(gaps.detach())
        return BetaStatistics(
            momentum * self.mean + (1 - momentum) * gaps.mean(), momentum * self.std + (1 - momentum) * gaps.std()
        )


def beta_dpo_batch(
    gaps: Tensor, statistics: BetaStatistics, *, beta: float, a: float, mode_weight: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """beta-DPO's batch-level beta (scalar) and the mask of kept pairs (N,), for the gaps (N,) of all ranks.

    Keeps int(N (1 - mode_weight)) pairs, drawn without replacement with p ~ exp(-0.5 ((gap - M) / S)^2); beta becomes
    beta (1 + a (mean of kept gaps - M)), at least 1e-3. Source: `preference_loss` in junkangwu/beta-DPO. Where S is
    0, a gap is not finite, there are fewer than two or nothing is kept (the published code makes NaN there), keeps
    all with the base beta.
    """
    _same_shape(gaps)
    gaps = _exact(gaps.detach())
    keep = int(len(gaps) * (1 - mode_weight))
    everything = torch.ones_like(gaps, dtype=torch.bool)
    base = torch.as_tensor(beta, dtype=gaps.dtype, device=gaps.device)
    drawable = bool(statistics.std > 0) and bool(torch.isfinite(gaps).all())
    if len(gaps) < 2 or keep == 0 or not drawable:
        return base, everything
    score = -0.5 * ((gaps - statistics.mean) / statistics.std) ** 2
    # The largest is shifted to 1, so that far outliers cannot make every probability 0.
    probability = torch.exp(score - score.max()).clamp(min=torch.finfo(torch.float32).tiny)
    drawn = torch.multinomial(probability.cpu(), keep, replacement=False, generator=generator)
    mask = torch.zeros_like(everything).index_fill(0, drawn.to(gaps.device), True)
    return (base * (1 + a * (gaps[mask].mean() - statistics.mean))).clamp(min=1e-3), mask


def beta_dpo_loss(logratio: Tensor, *, beta: float | Tensor) -> Tensor:
    """-log sigmoid(beta logratio) at the batch's own beta, which carries no gradient."""
    return dpo_loss(logratio, beta=beta.detach() if isinstance(beta, Tensor) else beta)
