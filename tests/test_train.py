"""The policy's training: every loss, and what stands beside it."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor

from madpo_ray import train
from madpo_ray.batching import MicroBatch, collate
from madpo_ray.config import Config, PolicyConfig, UserError
from madpo_ray.losses import madpo_weight
from madpo_ray.metrics import read_metrics
from madpo_ray.models import load_policy
from madpo_ray.train import BetaDPOObjective, PolicyObjective

COLUMNS = ("margin", "ref_chosen_logps", "ref_rejected_logps")


def synthetic() -> tuple[dict[str, Tensor], MicroBatch, Tensor]:
    """Outputs and batch of four pairs with known log-ratios, and those log-ratios."""
    generator = torch.Generator().manual_seed(0)
    rows = [
        {
            "prompt_ids": [1],
            "chosen_ids": [2] * (i + 1),
            "rejected_ids": [3] * (4 - i),
            "margin": m,
            "ref_chosen_logps": -5.0 - i,
            "ref_rejected_logps": -7.0,
        }
        for i, m in enumerate([-8.0, -1.0, 0.5, 9.0])
    ]
    batch = collate(rows, shared_prefix=True, column_names=COLUMNS)
    logps = torch.randn(8, generator=generator) - 6
    references = torch.cat([batch.columns["ref_chosen_logps"], batch.columns["ref_rejected_logps"]]).float()
    chosen, rejected = (logps - references).chunk(2)
    return {"logps": logps, "entropy": torch.ones(8)}, batch, chosen - rejected


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo", "ipo_sum", "madpo"])
def test_each_loss_is_the_one_that_the_config_names(loss_type: str) -> None:
    outputs, batch, logratio = synthetic()
    settings = PolicyConfig(loss_type=loss_type, beta=0.3, tau=6.907)
    terms = PolicyObjective(settings)(outputs, batch, training=True)
    dpo = torch.log1p(torch.exp(-0.3 * logratio))
    weight = madpo_weight(batch.columns["margin"], c_min=0.25, c_max=4.0, lmbda=1.0, tau=6.907).float()
    references = torch.cat([batch.columns["ref_chosen_logps"], batch.columns["ref_rejected_logps"]]).float()
    chosen, rejected = ((outputs["logps"] - references) / torch.tensor([1, 2, 3, 4, 4, 3, 2, 1])).chunk(2)
    expected = {
        "sigmoid": dpo,
        "ipo": (chosen - rejected - 1 / 0.6) ** 2,
        "ipo_sum": (logratio - 1 / 0.6) ** 2,
        "madpo": weight * dpo,
    }[loss_type]
    torch.testing.assert_close(terms.loss, expected)
    torch.testing.assert_close(terms.metrics["rewards/margins"], 0.3 * logratio)
    assert all(value.shape == (4,) for value in terms.metrics.values())


def test_label_smoothing_is_not_ignored() -> None:
    outputs, batch, logratio = synthetic()
    terms = PolicyObjective(PolicyConfig(loss_type="sigmoid", label_smoothing=0.2))(outputs, batch, training=True)
    expected = 0.8 * torch.log1p(torch.exp(-0.1 * logratio)) + 0.2 * torch.log1p(torch.exp(0.1 * logratio))
    torch.testing.assert_close(terms.loss, expected)


def test_beta_dpo_starts_with_the_base_beta_and_keeps_its_statistics() -> None:
    outputs, batch, logratio = synthetic()
    objective = BetaDPOObjective(PolicyConfig(loss_type="beta_dpo"), seed=0)
    terms = objective(outputs, batch, training=True)
    mean, std = 0.1 * logratio.mean(), 0.1 * logratio.std()
    kept = terms.loss > 0
    assert int(kept.sum()) == 3
    beta = 0.1 * (1 + 0.6 * (logratio[kept].mean() - mean))
    torch.testing.assert_close(terms.metrics["beta/effective"], beta.clamp(min=1e-3).expand(4))
    torch.testing.assert_close(terms.loss.mean(), torch.log1p(torch.exp(-beta * logratio[kept])).mean())
    torch.testing.assert_close(torch.stack(objective.state_dict()["statistics"]), torch.stack([mean, std]))
    objective(outputs, batch, training=False)
    torch.testing.assert_close(torch.stack(objective.state_dict()["statistics"]), torch.stack([mean, std]))


def test_beta_dpo_as_in_the_madpo_paper_counts_by_optimizer_step() -> None:
    outputs, batch, logratio = synthetic()
    settings = PolicyConfig(loss_type="beta_dpo", beta_dpo_variant="madpo_paper")
    objective = BetaDPOObjective(settings, seed=0)
    for _ in range(2):
        terms = objective(outputs, batch, training=True)
        beta = 0.1 * (1 + 0.6 * 0.1 * logratio.mean())
        torch.testing.assert_close(terms.metrics["beta/effective"][0], beta)
    objective.end_step()
    gaps = 0.1 * torch.cat([logratio, logratio])
    expected = torch.stack([0.1 * gaps.mean(), 0.9 + 0.1 * gaps.std()])
    torch.testing.assert_close(torch.stack(objective.state_dict()["statistics"]), expected)


@pytest.mark.parametrize("variant", ["published", "madpo_paper"])
def test_beta_dpo_passes_over_a_round_of_fillers(variant: str) -> None:
    objective = BetaDPOObjective(PolicyConfig(loss_type="beta_dpo", beta_dpo_variant=variant), seed=0)
    filler = collate([], shared_prefix=True, column_names=COLUMNS)
    terms = objective({"logps": torch.zeros(2), "entropy": torch.ones(2)}, filler, training=True)
    assert terms.loss.tolist() == [0.0]


def test_nll_and_a_pairs_own_weight_stand_beside_the_loss() -> None:
    outputs, batch, logratio = synthetic()
    weight = torch.tensor([0.0, 1.0, 2.0, 0.5], dtype=torch.float64)
    batch = dataclasses.replace(batch, columns={**batch.columns, "importance": weight})
    settings = PolicyConfig(loss_type="sigmoid", nll_loss_coef=0.3, weight_column="importance")
    terms = PolicyObjective(settings)(outputs, batch, training=True)
    nll = -outputs["logps"][:4] / torch.tensor([1, 2, 3, 4])
    expected = weight.float() * (torch.log1p(torch.exp(-0.1 * logratio)) + 0.3 * nll)
    torch.testing.assert_close(terms.loss, expected)
    torch.testing.assert_close(terms.metrics["nll_loss"], nll)


@pytest.mark.deepspeed
def test_beta_dpo_with_lora_under_zero_3(policy_job: Any, train_on: Any) -> None:
    job = policy_job(
        "lora",
        loss_type="beta_dpo",
        use_peft=True,
        lora_r=4,
        zero_stage=3,
        stage3_param_persistence_threshold=0,
        weight_column="importance",
    )
    train_on(job, 2)
    lines = read_metrics(job.metrics / "metrics.jsonl")
    assert abs(lines[0]["rewards/margins"]) < 1e-6
    assert "beta/effective" in lines[0]
    policy = load_policy(job.output / "model", job.config.model)
    moved = [parameter.abs().max().item() for name, parameter in policy.named_parameters() if "lora_B" in name]
    assert min(moved) > 0


@pytest.mark.deepspeed
@pytest.mark.parametrize("lora", [{}, {"use_peft": True, "lora_r": 4}])
def test_the_first_loss_is_ln_2(lora: dict[str, Any], policy_job: Any, train_on: Any) -> None:
    job = policy_job("first", loss_type="sigmoid", max_steps=1, **lora)
    train_on(job, 2)
    first = read_metrics(job.metrics / "metrics.jsonl")[0]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert abs(first["rewards/chosen"]) < 1e-6


@pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf")])
def test_weights_that_are_none_are_refused(weight: float, config: Config, tmp_path: Path) -> None:
    folder = tmp_path / "tiny" / "margins" / "data"
    folder.mkdir(parents=True)
    table = {"pair_id": ["a", "b"], "split": ["train", "validation"], "chosen_score": [1.0, weight]}
    pq.write_table(pa.table(table), folder / "part-000000.parquet")
    config = config.model_copy(update={"train": config.train.model_copy(update={"weight_column": "chosen_score"})})
    with pytest.raises(UserError, match=r"chosen_score is missing, negative or not finite for 1 pairs, such as b"):
        train.check_weights(config)
