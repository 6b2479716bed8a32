"""What a training writes: its policy, in plain transformers."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from madpo_ray.artifacts.tables import read_split
from madpo_ray.models.loading import load_policy
from madpo_ray.training.job import TrainingJob
from support.forwards import separate_logp
from support.ranks import SHARDED, MakeJob, TrainOn, logged, metrics_of
from support.tasks import FrozenNormTask, OneModelTask

pytestmark = pytest.mark.deepspeed


def exported_logps(folder: Path, job: TrainingJob) -> torch.Tensor:
    """Of the validation pairs under an exported policy, (pairs, 2), chosen first."""
    model: Any = load_policy(folder, job.model, base=job.base_folder).eval()
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    rows = read_split(job.rows, "validation", names).to_pylist()
    with torch.no_grad():
        logps = [
            torch.stack([separate_logp(model, row["prompt_ids"], row[side]) for side in names[1:]])
            for row in rows
        ]
    return torch.stack(logps)


@pytest.mark.parametrize("zero", [{"zero_stage": 2}, SHARDED])
def test_exports_have_the_log_probs_of_training(
    zero: dict[str, Any], policy_job: MakeJob, train_on: TrainOn
) -> None:
    """Full weights, an adapter, and merged: to 1e-6 relative."""
    lora = {"use_peft": True, "lora_r": 4, "learning_rate": 1e-2}
    jobs = {
        "full": policy_job("full", **zero),
        "adapter": policy_job("adapter", **zero, **lora),
        "merged": policy_job("merged", **zero, **lora, merge_adapter=True),
    }
    logps = {}
    for name, job in jobs.items():
        train_on(job, 2)
        measured = metrics_of(job)[-1]
        logps[name] = exported_logps(job.output / "model", job)
        chosen, rejected = logps[name].mean(0)
        assert float(chosen) == pytest.approx(measured["eval_logps/chosen"], rel=1e-6)
        assert float(rejected) == pytest.approx(measured["eval_logps/rejected"], rel=1e-6)
    assert (jobs["adapter"].output / "model" / "adapter_config.json").exists()
    assert not (jobs["merged"].output / "model" / "adapter_config.json").exists()
    torch.testing.assert_close(logps["merged"], logps["adapter"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("zero", [{"zero_stage": 2}, SHARDED])
def test_frozen_parameters_are_exported(
    zero: dict[str, Any], policy_job: MakeJob, train_on: TrainOn
) -> None:
    """Without them the policy would not load."""
    job = policy_job("frozen", **zero)
    job = dataclasses.replace(job, task=FrozenNormTask(columns=job.task.columns))
    train_on(job, 2)
    initial: Any = load_policy(job.base_folder, job.model)
    exported: Any = load_policy(job.output / "model", job.model)
    assert torch.equal(exported.model.norm.weight, initial.model.norm.weight)
    assert not torch.equal(exported.lm_head.weight, initial.lm_head.weight)


def test_best_evaluation_is_the_result(policy_job: MakeJob, train_on: TrainOn) -> None:
    """Patience ends the run, and no rank ever holds two models."""
    best = {"eval_steps": 2, "metric_for_best_model": "eval_loss", "early_stopping_patience": 3}
    length = {"num_train_epochs": 20, "max_steps": 40, "learning_rate": 3e-2}
    job = policy_job("best", **length, **best, **SHARDED)
    job = dataclasses.replace(job, task=OneModelTask(columns=job.task.columns))
    outcome = train_on(job, 2)
    losses = logged(job, "eval_loss")
    assert outcome.step == 2 * (int(losses.argmin()) + 1)
    assert len(losses) == int(losses.argmin()) + 1 + 3

    # The best step's policy was exported, not the last one's: its log-probs say so.
    measured = outcome.evaluation(metrics_of(job))
    assert measured["eval_loss"] == pytest.approx(float(losses.min()))
    chosen = exported_logps(job.output / "model", job)[:, 0].mean()
    assert float(chosen) == pytest.approx(measured["eval_logps/chosen"], rel=1e-5)

    # A finished run that was not exported is exported by the next start.
    again = dataclasses.replace(job, output=job.output.with_name("exported-again"))
    assert train_on(again, 2) == outcome
