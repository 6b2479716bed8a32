"""The table of losses, and the objectives of the three trainings.

A row of `LOSSES` gives a loss its value per pair, the columns that it reads and its own metrics.
Adding a loss: the formula in `losses.py`, a row here, its keys in `config/training.py`.

Legend: B pairs of a micro-batch.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from madpo_ray.columns import MARGIN, REF_LOGPS, REWARDS
from madpo_ray.config import LossType, PolicyConfig, RewardConfig
from madpo_ray.data.batching import MicroBatch
from madpo_ray.losses import (
    beta_dpo_loss,
    bradley_terry_loss,
    dpo_loss,
    ipo_loss,
    madpo_loss,
    madpo_weight,
)
from madpo_ray.training.beta_dpo import BetaDPO
from madpo_ray.training.metrics import Metric, means
from madpo_ray.training.protocols import Objective, PairBatch, Statistics, Terms


def _no_metrics(pairs: PairBatch, settings: PolicyConfig) -> dict[str, Metric]:
    return {}


class PairLoss(NamedTuple):
    """One row of the table of losses."""

    value: Callable[[PairBatch, PolicyConfig], Tensor]  # (B,)
    columns: tuple[str, ...] = REF_LOGPS
    metrics: Callable[[PairBatch, PolicyConfig], dict[str, Metric]] = _no_metrics
    # Makes what the loss carries from step to step, from settings and seed.
    statistics: Callable[[PolicyConfig, int], Statistics] | None = None


def _sigmoid(pairs: PairBatch, settings: PolicyConfig) -> Tensor:
    smoothing = settings.label_smoothing
    return dpo_loss(pairs.logratio, beta=settings.beta, label_smoothing=smoothing)


def _ipo(pairs: PairBatch, settings: PolicyConfig) -> Tensor:
    return ipo_loss(pairs.length_normalised, beta=settings.beta)


def _ipo_sum(pairs: PairBatch, settings: PolicyConfig) -> Tensor:
    return ipo_loss(pairs.logratio, beta=settings.beta)


def _beta_dpo(pairs: PairBatch, settings: PolicyConfig) -> Tensor:
    if pairs.batch_beta is None:  # evaluation
        return dpo_loss(pairs.logratio, beta=settings.beta)
    return beta_dpo_loss(pairs.logratio, beta=pairs.batch_beta.beta) * pairs.batch_beta.factor


def _beta_dpo_metrics(pairs: PairBatch, settings: PolicyConfig) -> dict[str, Metric]:
    if pairs.batch_beta is None:
        return {}
    return means({"beta/effective": torch.full_like(pairs.chosen, float(pairs.batch_beta.beta))})


def _madpo(pairs: PairBatch, settings: PolicyConfig) -> Tensor:
    assert pairs.margin is not None
    margin = pairs.margin.to(pairs.chosen.dtype)
    return madpo_loss(pairs.logratio, margin, beta=settings.beta, **settings.weighting)


def _madpo_metrics(pairs: PairBatch, settings: PolicyConfig) -> dict[str, Metric]:
    assert pairs.margin is not None
    weight = madpo_weight(pairs.margin, **settings.weighting)
    return {
        "weight/mean": Metric(weight),
        "weight/min": Metric(weight, "min"),
        "weight/max": Metric(weight, "max"),
        "weight/effective_sample_size": Metric(weight, "effective_share"),
    }


LOSSES: dict[LossType, PairLoss] = {
    "sigmoid": PairLoss(_sigmoid),
    "ipo": PairLoss(_ipo),
    "ipo_sum": PairLoss(_ipo_sum),
    "beta_dpo": PairLoss(_beta_dpo, metrics=_beta_dpo_metrics, statistics=BetaDPO),
    "madpo": PairLoss(_madpo, (MARGIN, *REF_LOGPS), _madpo_metrics),
}


def needs_margins(settings: PolicyConfig) -> bool:
    """Whether the loss reads rewards or their margin, and so needs a reward model."""
    return not {MARGIN, *REWARDS}.isdisjoint(LOSSES[settings.loss_type].columns)


class PolicyObjective(Objective):
    """The loss that the settings name, TRL's metrics, and those of margins if there are any."""

    def __init__(self, settings: PolicyConfig, seed: int) -> None:
        self._settings = settings
        self._loss = LOSSES[settings.loss_type]
        self._statistics: Statistics | None = None
        if self._loss.statistics is not None:
            self._statistics = self._loss.statistics(settings, seed)

    def __call__(
        self, outputs: Mapping[str, Tensor], batch: MicroBatch, *, training: bool
    ) -> Terms:
        settings = self._settings
        pairs = PairBatch.of(outputs, batch)
        if training and self._statistics is not None:
            pairs = self._statistics.observe(pairs, batch.valid > 0)

        loss = self._loss.value(pairs, settings)
        metrics = _preference_metrics(pairs, outputs["entropy"], settings.beta)
        metrics |= self._loss.metrics(pairs, settings)

        if settings.nll_loss_coef:
            nll = -pairs.chosen / pairs.chosen_lengths
            metrics["nll_loss"] = Metric(nll)
            loss = loss + settings.nll_loss_coef * nll
        if settings.weight_column is not None:
            loss = loss * batch.columns[settings.weight_column].to(loss)
        return Terms(loss, metrics)

    def end_step(self) -> None:
        if self._statistics is not None:
            self._statistics.end_step()

    def state_dict(self) -> dict[str, Any]:
        return {} if self._statistics is None else self._statistics.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if self._statistics is None:
            super().load_state_dict(state)
        else:
            self._statistics.load_state_dict(state)


def _preference_metrics(pairs: PairBatch, entropy: Tensor, beta: float) -> dict[str, Metric]:
    """TRL's metrics, and those of reward margins; `entropy` is (2B,), a mean over tokens."""
    chosen = beta * (pairs.chosen - pairs.ref_chosen)
    rejected = beta * (pairs.rejected - pairs.ref_rejected)

    # The mean over the tokens of both responses.
    total_entropy = (entropy * pairs.lengths).view(2, -1).sum(0)
    metrics = {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": chosen - rejected,
        "rewards/accuracies": _wins(chosen, rejected),
        "logps/chosen": pairs.chosen,
        "logps/rejected": pairs.rejected,
        "entropy": total_entropy / pairs.lengths.view(2, -1).sum(0),
    }

    if pairs.margin is not None:
        metrics["margin/mean"] = pairs.margin
        metrics["margin/negative_fraction"] = (pairs.margin < 0).float()
    return means(metrics)


def _wins(chosen: Tensor, rejected: Tensor) -> Tensor:
    """1 if chosen is greater, 0 if not, and one half for a tie, (B,)."""
    return (chosen > rejected).float() + 0.5 * (chosen == rejected).float()


@dataclass(frozen=True)
class RewardObjective(Objective):
    """Bradley-Terry, with TRL's optional pull of the rewards' sum towards 0."""

    settings: RewardConfig

    def __call__(
        self, outputs: Mapping[str, Tensor], batch: MicroBatch, *, training: bool
    ) -> Terms:
        chosen, rejected = outputs["rewards"].chunk(2)  # (B,) each
        centering = self.settings.center_rewards_coefficient * (chosen + rejected) ** 2
        loss = bradley_terry_loss(chosen, rejected) + centering
        return Terms(
            loss,
            {
                "accuracy": Metric(_wins(chosen, rejected)),
                "margin": Metric(chosen - rejected),
                "mean_reward": Metric((chosen + rejected) / 2),
                "min_reward": Metric(torch.minimum(chosen, rejected), "min"),
                "max_reward": Metric(torch.maximum(chosen, rejected), "max"),
            },
        )


class SFTObjective(Objective):
    """The mean of -log p over the step's response tokens, without the prompts."""

    def __call__(
        self, outputs: Mapping[str, Tensor], batch: MicroBatch, *, training: bool
    ) -> Terms:
        # The loop averages over pairs: times pairs, over tokens, makes it the mean over tokens.
        place = batch.place
        loss = -outputs["logps"] * (place.pairs_in_step / place.response_tokens_in_step)  # (B,)
        return Terms(loss, means({"entropy": outputs["entropy"]}))
