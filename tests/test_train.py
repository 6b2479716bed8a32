"""The policy's training: every loss, the same numbers on one worker and two, ZeRO stages, LoRA, and a crash."""

import dataclasses
import math
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import ray.train
import torch
from torch import Tensor

from madpo_ray import train
from madpo_ray.batching import MicroBatch, collate
from madpo_ray.config import Config, PolicyConfig, UserError
from madpo_ray.launch import newest_checkpoint, train_on_ray
from madpo_ray.loop import Objective, Terms
from madpo_ray.losses import madpo_weight
from madpo_ray.metrics import read_metrics
from madpo_ray.models import load_policy
from madpo_ray.plan import Plan
from madpo_ray.train import BetaDPOObjective, PolicyObjective, PolicyTask
from madpo_ray.worker import TrainingJob

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


class CrashOnce(Objective):
    """An objective whose process dies, once, in the middle of a step."""

    def __init__(self, inner: Any, marker: Path, calls: int) -> None:
        self._inner, self._marker, self._calls = inner, marker, calls
        self.end_step, self.state_dict, self.load_state_dict = inner.end_step, inner.state_dict, inner.load_state_dict

    def __call__(self, outputs: Mapping[str, Tensor], batch: MicroBatch, *, training: bool) -> Terms:
        self._calls -= training
        if self._calls == 0 and not self._marker.exists():
            self._marker.touch()
            os._exit(1)
        return self._inner(outputs, batch, training=training)  # type: ignore[no-any-return]


@dataclasses.dataclass(frozen=True)
class CrashingTask(PolicyTask):
    marker: Path = Path()

    def objective(self, config: Config) -> Objective:
        return CrashOnce(super().objective(config), self.marker, calls=4)


class Poisoned(PolicyObjective):
    """A loss that is finite and whose gradient is not: the square root at 0."""

    def __call__(self, outputs: Mapping[str, Tensor], batch: MicroBatch, *, training: bool) -> Terms:
        terms = super().__call__(outputs, batch, training=training)
        return Terms(terms.loss + (terms.loss - terms.loss.detach()).sqrt(), terms.metrics)


class PoisonedTask(PolicyTask):
    def objective(self, config: Config) -> Objective:
        return Poisoned(config.train)


@pytest.mark.ray
@pytest.mark.deepspeed
class TestOnRay:
    @pytest.fixture(autouse=True)
    def _by_value(self) -> None:
        import ray.cloudpickle

        ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])

    @staticmethod
    def job(config: Config, output: Path, *, workers: int = 2, **changes: Any) -> TrainingJob:
        config = config.model_copy(
            update={
                "train": config.train.model_copy(update=changes),
                "cluster": config.cluster.model_copy(update={"num_workers": workers}),
            }
        )
        return train.job(config, output=output, experiment=f"test-{output.name}")

    @staticmethod
    def losses(output: Path) -> torch.Tensor:
        return torch.tensor([line["loss"] for line in read_metrics(output / "metrics.jsonl") if "loss" in line])

    def test_workers_accumulation_and_zero_stage_change_no_loss(
        self, finished_run: tuple[Config, Any], tmp_path: Path
    ) -> None:
        config, _ = finished_run
        runs = {
            "one": {"workers": 1, "per_device_train_batch_size": 4},
            "two": {"workers": 2, "per_device_train_batch_size": 2},
            "whole": {"workers": 1, "per_device_train_batch_size": 8, "zero_stage": 0},
            "sharded": {
                "workers": 2,
                "per_device_train_batch_size": 3,
                "zero_stage": 3,
                "stage3_param_persistence_threshold": 0,
            },
        }
        # 50 pairs or so in steps of 8: the last step of the epoch is short, and one worker has none of it.
        for name, changes in runs.items():
            train_on_ray(self.job(config, tmp_path / name, max_steps=9, num_train_epochs=2, **changes))
        reference = self.losses(tmp_path / "one")
        assert len(reference) == 9
        assert len(set(reference.tolist())) == 9
        for name in runs:
            torch.testing.assert_close(self.losses(tmp_path / name), reference, rtol=0, atol=1e-5)
        weights = [load_policy(tmp_path / name / "model", config.model).state_dict() for name in ("one", "sharded")]
        assert weights[0].keys() == weights[1].keys()
        for name, weight in weights[0].items():
            torch.testing.assert_close(weight, weights[1][name], rtol=0, atol=1e-4)

    def test_beta_dpo_with_lora_under_zero_3(self, finished_run: tuple[Config, Any], tmp_path: Path) -> None:
        config, _ = finished_run
        job = self.job(
            config,
            tmp_path / "lora",
            loss_type="beta_dpo",
            use_peft=True,
            lora_r=4,
            zero_stage=3,
            stage3_param_persistence_threshold=0,
        )
        train_on_ray(job)
        lines = read_metrics(tmp_path / "lora" / "metrics.jsonl")
        assert lines[0]["loss"] == pytest.approx(0.693147, abs=1e-6)
        assert "beta/effective" in lines[0]
        policy = load_policy(tmp_path / "lora" / "model", config.model)
        moved = [parameter.abs().max().item() for name, parameter in policy.named_parameters() if "lora_B" in name]
        assert min(moved) > 0

    def test_a_worker_that_dies_is_restarted_to_the_same_numbers(
        self, finished_run: tuple[Config, Any], tmp_path: Path
    ) -> None:
        config, _ = finished_run
        changes = {"loss_type": "beta_dpo", "save_steps": 2, "per_device_train_batch_size": 4}
        train_on_ray(self.job(config, tmp_path / "calm", **changes))
        crashing = self.job(config, tmp_path / "crash", **changes)
        train_on_ray(dataclasses.replace(crashing, task=CrashingTask(marker=tmp_path / "died")))
        assert (tmp_path / "died").exists()
        assert torch.equal(self.losses(tmp_path / "calm"), self.losses(tmp_path / "crash"))

    def test_bfloat16_with_recomputation(self, finished_run: tuple[Config, Any], tmp_path: Path) -> None:
        config, _ = finished_run
        job = self.job(config, tmp_path / "bf16", workers=1, zero_stage=1, gradient_checkpointing=True)
        model = config.model.model_copy(update={"dtype": "bfloat16"})
        train_on_ray(dataclasses.replace(job, config=job.config.model_copy(update={"model": model})))
        lines = read_metrics(tmp_path / "bf16" / "metrics.jsonl")
        # The stored reference log-probs are float32's, so the first loss is only near ln 2.
        assert all(math.isfinite(line["loss"]) for line in lines if "loss" in line)
        assert all(math.isfinite(line["grad_norm"]) for line in lines if "grad_norm" in line)

    @pytest.mark.parametrize("zero_stage", [0, pytest.param(2, marks=pytest.mark.slow)])
    def test_a_loss_that_is_not_finite_stops_the_run(
        self, zero_stage: int, finished_run: tuple[Config, Any], tmp_path: Path
    ) -> None:
        config, _ = finished_run
        job = self.job(config, tmp_path / "nan", workers=1, zero_stage=zero_stage)
        cluster = job.config.cluster.model_copy(update={"max_failures": 0})
        job = dataclasses.replace(
            job,
            task=PoisonedTask(),
            config=job.config.model_copy(update={"cluster": cluster}),
            experiment=f"nan-{zero_stage}",
        )
        with pytest.raises(ray.train.TrainingFailedError) as failed:
            train_on_ray(job)
        assert "gradient's norm of step 1 is" in str(failed.value)
        assert "the optimizer has not moved" in str(failed.value)

    def test_another_number_of_workers_does_not_resume(self, finished_run: tuple[Config, Any], tmp_path: Path) -> None:
        config, _ = finished_run
        train_on_ray(self.job(config, tmp_path / "resized", workers=1, max_steps=1))
        with pytest.raises(UserError, match="saved by another number of workers"):
            train_on_ray(self.job(config, tmp_path / "resized", workers=2, max_steps=1))
        torn = next((config.run.folder / "ray" / "test-resized").glob("checkpoint_*/rank-0.pt"))
        torn.write_bytes(torn.read_bytes()[:-1])
        assert newest_checkpoint(config.run.folder / "ray" / "test-resized") is None

    def test_every_rank_reads_its_rows_in_order(self, finished_run: tuple[Config, Any], tmp_path: Path) -> None:
        config, _ = finished_run
        job = self.job(config, tmp_path, num_train_epochs=2, max_steps=-1)
        plan = Plan(job.plan(num_workers=3))
        seen: list[str] = []
        for number in range(plan.num_micro_batches):
            row = plan.row(number).to_pylist()[0]
            seen += row["pair_id"]
            assert row["step"] == number // plan.micro_batches_per_step
        half = len(seen) // 2
        assert sorted(seen[:half]) == sorted(seen[half:]) == sorted(set(seen))
        assert seen[:half] != seen[half:]
