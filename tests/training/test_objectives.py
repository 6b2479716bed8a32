"""The table of losses: values, columns and metrics."""

import dataclasses
from typing import get_args

import pytest
import torch

from madpo_ray.columns import MARGIN, REF_LOGPS
from madpo_ray.config import LossType, PolicyConfig, RewardConfig
from madpo_ray.data.batching import collate
from madpo_ray.data.order import StepPlace
from madpo_ray.losses import madpo_weight
from madpo_ray.training.objectives import (
    LOSSES,
    PolicyObjective,
    RewardObjective,
    SFTObjective,
    needs_margins,
)
from support.synthetic import CHOSEN_LENGTHS, REJECTED_LENGTHS, reference_logps, synthetic

WEIGHTING = {"c_min": 0.25, "c_max": 4.0, "lmbda": 1.0, "tau": 6.907}


def objective(**settings: object) -> PolicyObjective:
    return PolicyObjective(PolicyConfig(**settings), seed=0)


def test_every_loss_type_has_a_row() -> None:
    assert LOSSES.keys() == set(get_args(LossType))


@pytest.mark.parametrize("loss_type", get_args(LossType))
def test_only_madpo_needs_margins(loss_type: LossType) -> None:
    assert needs_margins(PolicyConfig(loss_type=loss_type)) is (loss_type == "madpo")
    assert set(REF_LOGPS) <= set(LOSSES[loss_type].columns)


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo", "ipo_sum", "madpo"])
def test_loss_is_the_one_that_the_config_names(loss_type: str) -> None:
    outputs, batch, logratio = synthetic()
    terms = objective(loss_type=loss_type, beta=0.3, tau=6.907)(outputs, batch, training=True)

    dpo = torch.log1p(torch.exp(-0.3 * logratio))
    weight = madpo_weight(batch.columns[MARGIN], **WEIGHTING).float()
    lengths = torch.cat([CHOSEN_LENGTHS, REJECTED_LENGTHS])
    chosen, rejected = ((outputs["logps"] - reference_logps(batch)) / lengths).chunk(2)
    expected = {
        "sigmoid": dpo,
        "ipo": (chosen - rejected - 1 / 0.6) ** 2,
        "ipo_sum": (logratio - 1 / 0.6) ** 2,
        "madpo": weight * dpo,
    }[loss_type]
    torch.testing.assert_close(terms.loss, expected)
    assert all(metric.values.shape == (4,) for metric in terms.metrics.values())


def test_metrics_by_hand() -> None:
    outputs, batch, logratio = synthetic()
    terms = objective(beta=0.3, tau=6.907)(outputs, batch, training=True)
    metrics = {name: metric.values for name, metric in terms.metrics.items()}

    chosen, rejected = (outputs["logps"] - reference_logps(batch)).chunk(2)
    torch.testing.assert_close(metrics["rewards/chosen"], 0.3 * chosen)
    torch.testing.assert_close(metrics["rewards/rejected"], 0.3 * rejected)
    torch.testing.assert_close(metrics["rewards/margins"], 0.3 * logratio)
    torch.testing.assert_close(metrics["rewards/accuracies"], (logratio > 0).float())
    torch.testing.assert_close(metrics["logps/chosen"], outputs["logps"][:4])
    torch.testing.assert_close(metrics["logps/rejected"], outputs["logps"][4:])

    # The mean over the tokens of both responses, of entropies 1 to 8.
    entropy = CHOSEN_LENGTHS * torch.arange(1, 5) + REJECTED_LENGTHS * torch.arange(5, 9)
    torch.testing.assert_close(metrics["entropy"], entropy / 5)

    assert metrics["margin/mean"].tolist() == [-8.0, -1.0, 0.5, 9.0]
    assert metrics["margin/negative_fraction"].tolist() == [1.0, 1.0, 0.0, 0.0]
    weight = madpo_weight(batch.columns[MARGIN], **WEIGHTING)
    reductions = {}
    for name, metric in terms.metrics.items():
        if name.startswith("weight/"):
            torch.testing.assert_close(metric.values, weight)
            reductions[name] = metric.reduction
    assert reductions == {
        "weight/mean": "mean",
        "weight/min": "min",
        "weight/max": "max",
        "weight/effective_sample_size": "effective_share",
    }


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo", "ipo_sum", "beta_dpo"])
def test_margin_metrics_need_margins(loss_type: str) -> None:
    """They appear if margins exist; weights belong to madpo."""
    for columns, has_margins in (((MARGIN, *REF_LOGPS), True), (REF_LOGPS, False)):
        outputs, batch, _ = synthetic(columns)
        metrics = objective(loss_type=loss_type)(outputs, batch, training=True).metrics
        assert ("margin/mean" in metrics) is has_margins
        assert not any(name.startswith("weight/") for name in metrics)


def test_label_smoothing_is_not_ignored() -> None:
    outputs, batch, logratio = synthetic()
    smoothed = objective(loss_type="sigmoid", label_smoothing=0.2)
    terms = smoothed(outputs, batch, training=True)
    agree = torch.log1p(torch.exp(-0.1 * logratio))
    disagree = torch.log1p(torch.exp(0.1 * logratio))
    torch.testing.assert_close(terms.loss, 0.8 * agree + 0.2 * disagree)


def test_nll_and_weight_column() -> None:
    """The weight multiplies the loss with its NLL term."""
    outputs, batch, logratio = synthetic()
    weight = torch.tensor([0.0, 1.0, 2.0, 0.5], dtype=torch.float64)
    batch = dataclasses.replace(batch, columns={**batch.columns, "importance": weight})
    weighted = objective(loss_type="sigmoid", nll_loss_coef=0.3, weight_column="importance")
    terms = weighted(outputs, batch, training=True)
    nll = -outputs["logps"][:4] / CHOSEN_LENGTHS
    expected = weight.float() * (torch.log1p(torch.exp(-0.1 * logratio)) + 0.3 * nll)
    torch.testing.assert_close(terms.loss, expected)
    torch.testing.assert_close(terms.metrics["nll_loss"].values, nll)


def test_stateless_losses_have_no_state() -> None:
    madpo = objective()
    assert madpo.state_dict() == {}
    madpo.load_state_dict({})
    with pytest.raises(AssertionError, match="another objective"):
        madpo.load_state_dict({"statistics": ()})


def test_reward_objective_by_hand() -> None:
    """Rewards 1, 0, 1 against 0, 2, 2: -log sigmoid of 1, -2, -1, plus 0.1 * sum^2."""
    outputs = {"rewards": torch.tensor([1.0, 0.0, 1.0, 0.0, 2.0, 2.0])}
    _, batch, _ = synthetic()
    settings = RewardConfig(center_rewards_coefficient=0.1)
    terms = RewardObjective(settings)(outputs, batch, training=True)
    expected = torch.tensor([0.313262 + 0.1, 2.126928 + 0.4, 1.313262 + 0.9])
    torch.testing.assert_close(terms.loss, expected, atol=1e-5, rtol=0)

    metrics = {name: metric.values.tolist() for name, metric in terms.metrics.items()}
    assert metrics == {
        "accuracy": [1.0, 0.0, 0.0],
        "margin": [1.0, -2.0, -1.0],
        "mean_reward": [0.5, 1.0, 1.5],
        "min_reward": [0.0, 0.0, 1.0],
        "max_reward": [1.0, 2.0, 2.0],
    }
    assert terms.metrics["min_reward"].reduction == "min"
    assert terms.metrics["max_reward"].reduction == "max"


def test_ties_count_one_half() -> None:
    """In both accuracies; TRL counts them as lost."""
    _, batch, _ = synthetic()
    outputs = {"rewards": torch.tensor([1.0, 0.0, 1.0, 2.0])}
    terms = RewardObjective(RewardConfig())(outputs, batch, training=True)
    assert terms.metrics["accuracy"].values.tolist() == [0.5, 0.0]
    outputs = {"logps": reference_logps(batch), "entropy": torch.ones(8)}
    terms = objective()(outputs, batch, training=True)
    assert terms.metrics["rewards/accuracies"].values.tolist() == [0.5] * 4


def test_sft_objective_is_the_mean_over_tokens() -> None:
    """The loop's mean over pairs of it is -sum(logps) / response tokens."""
    pairs = [
        {"prompt_ids": [1], "chosen_ids": [2, 3]},
        {"prompt_ids": [1], "chosen_ids": [4, 5, 6]},
    ]
    place = StepPlace(pairs_in_step=4, response_tokens_in_step=10)
    batch = collate(pairs, packed=True, responses=["chosen_ids"], place=place)
    outputs = {"logps": torch.tensor([-3.0, -5.0]), "entropy": torch.ones(2)}
    terms = SFTObjective()(outputs, batch, training=True)
    assert float(terms.loss.sum() / place.pairs_in_step) == pytest.approx(8.0 / 10)
    torch.testing.assert_close(terms.metrics["entropy"].values, outputs["entropy"])
