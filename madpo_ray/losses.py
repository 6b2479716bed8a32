"""The formulas: pure functions of (B,) tensors, without reduction.

Legend: B pairs, chosen first. `logratio` is (logp_chosen - ref_logp_chosen) - (logp_rejected -
ref_logp_rejected), with log-probs summed over response tokens, in nats. `margin` is the reward
model's r(x, chosen) - r(x, rejected), in reward units. Losses and weights return (B,), in float32,
or in float64 if float64 is given.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


def _at_least_float32(value: Tensor) -> Tensor:
    """bfloat16 is too coarse in the tails, where the weight matters."""
    return value if value.dtype == torch.float64 else value.float()


def _check_shapes(*values: Tensor) -> None:
    """Raises ValueError unless all are (B,) of one length; others would broadcast silently."""
    shapes = [tuple(value.shape) for value in values]
    if len(set(shapes)) != 1 or len(shapes[0]) != 1:
        raise ValueError(f"expected (B,) tensors of one length, got shapes {shapes}")


def madpo_weight(margin: Tensor, *, c_min: float, c_max: float, lmbda: float, tau: float) -> Tensor:
    """MADPO's weight of each pair.

    With R = (c_max - 1) / (1 - c_min) and
    c(h) = c_min + (c_max - c_min) / (1 + R exp(lmbda (|h| - tau))), the weight is
    w(h) = sigmoid(c(h) h) / sigmoid(h) if h > -tau, else 1. Source: `MADPOLoss` in the authors'
    `utils/loss_functions.py`.

    Worked by hand, at c_max = 4, c_min = 0.25, lmbda = 1, tau = 6.907: R = 3 / 0.75 = 4. At h = -1,
    exp(1 - 6.907) = 0.00272, so c = 0.25 + 3.75 / 1.01089 = 3.9596 and
    w = sigmoid(-3.9596) / sigmoid(-1) = 0.018715 / 0.268941 = 0.0696. At h = 0 the weight is 1; at
    h = tau, c = 0.25 + 3.75 / 5 = 1 and the weight is 1; at h = -7 it is 1 by definition.

    Raises:
        ValueError: unless 0 < c_min < 1 < c_max, lmbda > 0, tau > 0 (c_min = 1 or c_max = 1 is
            0/0), or `margin` is not (B,).
    """
    if not (0 < c_min < 1 < c_max and lmbda > 0 and tau > 0):
        raise ValueError(
            "need 0 < c_min < 1 < c_max, lmbda > 0, tau > 0; "
            f"got {c_min=}, {c_max=}, {lmbda=}, {tau=}"
        )
    _check_shapes(margin)
    h = _at_least_float32(margin)

    # exp overflows to inf for huge margins: the quotient is then exactly 0, and c is c_min.
    ratio = (c_max - 1) / (1 - c_min)
    c = c_min + (c_max - c_min) / (1 + ratio * torch.exp(lmbda * (h.abs() - tau)))

    # In logs, and with h made harmless outside: the plain quotient is 0/0 for very negative
    # margins, and its NaN survives a mask.
    is_inside = h > -tau
    h = torch.where(is_inside, h, 0.0)
    return torch.where(is_inside, torch.exp(F.logsigmoid(c * h) - F.logsigmoid(h)), 1.0)


def dpo_loss(logratio: Tensor, *, beta: float | Tensor, label_smoothing: float = 0.0) -> Tensor:
    """-log sigmoid(beta logratio): DPO (Rafailov et al. 2023, eq. 7).

    With label_smoothing it is cDPO (Mitchell 2023, eq. 3). Worked by hand: logratio 0 gives
    ln 2 = 0.693147; logratio 10 at beta 0.1 gives ln(1 + exp(-1)) = 0.313262.
    """
    _check_shapes(logratio)
    z = beta * _at_least_float32(logratio)
    return -F.logsigmoid(z) * (1 - label_smoothing) - F.logsigmoid(-z) * label_smoothing


def madpo_loss(
    logratio: Tensor,
    margin: Tensor,
    *,
    beta: float,
    c_min: float,
    c_max: float,
    lmbda: float,
    tau: float,
) -> Tensor:
    """w(margin) * -log sigmoid(beta logratio).

    The objective is its plain mean, not divided by the sum of weights. Source: `MADPOLoss` of the
    authors. Worked by hand: margin -1, logratio 10 at beta 0.1 and the settings of `madpo_weight`
    gives 0.0696 * 0.313262 = 0.0218.
    """
    _check_shapes(logratio, margin)
    weight = madpo_weight(margin, c_min=c_min, c_max=c_max, lmbda=lmbda, tau=tau)
    return weight.detach() * dpo_loss(logratio, beta=beta)


def ipo_loss(z: Tensor, *, beta: float) -> Tensor:
    """(z - 1 / (2 beta))^2: IPO (Azar et al. 2023, eq. 17).

    The caller makes `z`: the difference of log-ratios, each divided by its response's length
    (`ipo`, as TRL), or their plain difference (`ipo_sum`, as the MADPO authors). Worked by hand:
    z = 3 at beta 0.1 gives (3 - 5)^2 = 4.
    """
    _check_shapes(z)
    return (_at_least_float32(z) - 1 / (2 * beta)) ** 2


def bradley_terry_loss(chosen_reward: Tensor, rejected_reward: Tensor) -> Tensor:
    """-log sigmoid(chosen_reward - rejected_reward) (Bradley and Terry 1952).

    Worked by hand: rewards 1 and 0 give 0.313262.
    """
    _check_shapes(chosen_reward, rejected_reward)
    return -F.logsigmoid(_at_least_float32(chosen_reward) - _at_least_float32(rejected_reward))


class BetaStatistics(NamedTuple):
    """Running mean and standard deviation of beta-DPO's gaps, both scalars."""

    mean: Tensor
    std: Tensor

    def updated(self, gaps: Tensor, momentum: float = 0.9) -> "BetaStatistics":
        """The moving average after the gaps (N,) of one batch of all ranks.

        A single gap has no standard deviation, so it changes nothing.
        """
        if len(gaps) < 2:
            return self
        gaps = _at_least_float32(gaps.detach())
        mean = momentum * self.mean + (1 - momentum) * gaps.mean()
        std = momentum * self.std + (1 - momentum) * gaps.std()
        return BetaStatistics(mean, std)


def beta_dpo_batch(
    gaps: Tensor,
    statistics: BetaStatistics,
    *,
    beta: float,
    a: float,
    mode_weight: float,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """beta-DPO's batch-level beta (scalar) and the mask of kept pairs (N,), for gaps (N,).

    Keeps int(N (1 - mode_weight)) pairs, drawn without replacement with
    p ~ exp(-0.5 ((gap - M) / S)^2); beta becomes beta (1 + a (mean of kept gaps - M)), at least
    1e-3. Source: `preference_loss` in junkangwu/beta-DPO. If S is 0, a gap is not finite, there are
    fewer than two gaps or none would be kept, all pairs are kept with the base beta; the published
    code gives NaN there.
    """
    _check_shapes(gaps)
    gaps = _at_least_float32(gaps.detach())
    base_beta = torch.as_tensor(beta, dtype=gaps.dtype, device=gaps.device)
    all_kept = torch.ones_like(gaps, dtype=torch.bool)

    num_kept = int(len(gaps) * (1 - mode_weight))
    is_drawable = bool(statistics.std > 0) and bool(torch.isfinite(gaps).all())
    if len(gaps) < 2 or num_kept == 0 or not is_drawable:
        return base_beta, all_kept

    # The largest score is shifted to 1, so that distant outliers cannot make all of them 0.
    score = -0.5 * ((gaps - statistics.mean) / statistics.std) ** 2
    probability = torch.exp(score - score.max()).clamp(min=torch.finfo(torch.float32).tiny)
    drawn = torch.multinomial(probability.cpu(), num_kept, replacement=False, generator=generator)

    kept = torch.zeros_like(all_kept).index_fill(0, drawn.to(gaps.device), True)
    batch_beta = base_beta * (1 + a * (gaps[kept].mean() - statistics.mean))
    return batch_beta.clamp(min=1e-3), kept


def beta_dpo_loss(logratio: Tensor, *, beta: float | Tensor) -> Tensor:
    """-log sigmoid(beta logratio) at the batch's own beta, which carries no gradient."""
    return dpo_loss(logratio, beta=beta.detach() if isinstance(beta, Tensor) else beta)
