"""The tasks on real ranks: first losses, LoRA, bfloat16, beta-DPO, SFT, reward model."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from madpo_ray.artifacts.tables import read_columns, write_table
from madpo_ray.columns import LENGTHS
from madpo_ray.config import ModelConfig, RewardConfig, SFTConfig
from madpo_ray.models.loading import load_policy, load_tokenizer
from madpo_ray.training.job import RewardTask, SFTTask, TrainingJob
from support.forwards import separate_logp
from support.models import make_model
from support.ranks import SHARDED, MakeJob, Ranks, TrainOn, logged, metrics_of
from support.reference import with_reference

TRAINING = {
    "learning_rate": 1e-2,
    "global_batch_size": 8,
    "per_device_train_batch_size": 2,
    "logging_steps": 1,
}
pytestmark = pytest.mark.deepspeed


@pytest.mark.parametrize("lora", [{}, {"use_peft": True, "lora_r": 4}])
def test_first_loss_is_ln_2(lora: dict[str, Any], policy_job: MakeJob, train_on: TrainOn) -> None:
    """Policy and reference come from one code path: to 1e-6."""
    job = policy_job("first", loss_type="sigmoid", max_steps=1, **lora)
    train_on(job, 2)
    first = metrics_of(job)[0]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert abs(first["rewards/chosen"]) < 1e-6


def test_bfloat16_starts_at_ln_2(policy_job: MakeJob, train_on: TrainOn, tmp_path: Path) -> None:
    """With recomputation, and a bfloat16 reference.

    Other micro-batches pad rows to other lengths, which bfloat16 sees: log-probs of about -30, to 8
    bits.
    """
    settings = {"zero_stage": 1, "gradient_checkpointing": True, "loss_type": "sigmoid"}
    job = policy_job("bf16", {"dtype": "bfloat16"}, **settings)
    names = ("pair_id", "split", *LENGTHS, *LENGTHS.values(), "margin")
    table = read_columns(job.rows, names)
    rows = tmp_path / "bf16" / "data"
    write_table(with_reference(table, job.base_folder, job.model, batch_size=2), rows)
    train_on(dataclasses.replace(job, rows=rows), 1)
    assert float(logged(job)[0]) == pytest.approx(math.log(2), abs=0.02)
    assert all(math.isfinite(value) for value in logged(job, "grad_norm").tolist())


def test_beta_dpo_with_lora_under_zero_3(policy_job: MakeJob, train_on: TrainOn) -> None:
    settings = {"loss_type": "beta_dpo", "weight_column": "importance"}
    job = policy_job("lora", **settings, use_peft=True, lora_r=4, **SHARDED)
    train_on(job, 2)
    first = metrics_of(job)[0]
    assert abs(first["rewards/margins"]) < 1e-6
    assert "beta/effective" in first
    policy = load_policy(job.output / "model", job.model, base=job.base_folder)
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            assert parameter.abs().max() > 0


def test_beta_dpo_sees_all_ranks(policy_job: MakeJob, train_on: TrainOn) -> None:
    """1 x 8 pairs and 2 x 4 pairs: the same statistics and beta, if all pairs are kept.

    Which ones a filter draws depends on their order over the ranks.
    """
    losses = []
    for ranks in (1, 2):
        size = 8 // ranks
        job = policy_job(
            f"ranks-{ranks}",
            loss_type="beta_dpo",
            beta_dpo_mode_weight=0.0,
            per_device_train_batch_size=size,
            num_train_epochs=2,
            max_steps=12,
        )
        train_on(job, ranks)
        losses.append(torch.stack([logged(job), logged(job, "beta/effective")]))
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-4, atol=1e-5)


def test_sft_learns_the_chosen_responses(policy_job: MakeJob, train_on: TrainOn) -> None:
    """Its eval_loss is the exported model's, in nats per token."""
    settings = SFTConfig(**{**TRAINING, "num_train_epochs": 4})
    job = dataclasses.replace(policy_job("sft"), task=SFTTask(), settings=settings)
    train_on(job, 2)
    losses = logged(job)
    assert losses[-1] < losses[0] / 2

    model: Any = load_policy(job.output / "model", job.model).eval()
    rows = read_columns(job.rows, ("split", "prompt_ids", "chosen_ids")).to_pylist()
    held_out = [row for row in rows if row["split"] == "validation"]
    with torch.no_grad():
        total = sum(
            float(separate_logp(model, row["prompt_ids"], row["chosen_ids"])) for row in held_out
        )
    num_tokens = sum(len(row["chosen_ids"]) for row in held_out)
    expected = float(logged(job, "eval_loss")[-1])
    assert -total / num_tokens == pytest.approx(expected, abs=1e-5)


def test_reward_model_learns_its_pairs(policy_job: MakeJob, train_on: TrainOn) -> None:
    """From ln 2, since the new head is zero; its tokenizer pads with another token than EOS."""
    settings = RewardConfig(**TRAINING, num_train_epochs=3, use_peft=True, lora_r=4)
    job = dataclasses.replace(policy_job("reward"), task=RewardTask(), settings=settings)
    train_on(job, 2)
    losses = logged(job)
    assert float(losses[0]) == pytest.approx(math.log(2), abs=1e-6)
    assert losses[-3:].mean() < 0.6
    model = ModelConfig(model_name_or_path=str(job.output / "model"))
    tokenizer: Any = load_tokenizer(job.output / "model", model)
    assert tokenizer.pad_token_id != tokenizer.eos_token_id


@pytest.fixture
def bloom_job(policy_job: MakeJob, tokenizer: Any, tmp_path: Path) -> MakeJob:
    """Trainings of a model that reads a row per response: its positions are distances."""
    folder = tmp_path / "bloom"
    model = make_model("bloom", attention="eager", n_layer=2, hidden_size=32, n_head=4)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)

    def make(name: str, **settings: Any) -> TrainingJob:
        job = policy_job(name, {"attn_implementation": "eager"}, **settings)
        return dataclasses.replace(job, base_folder=folder)

    return make


def test_reading_is_found_under_zero_3(bloom_job: MakeJob, train_on: TrainOn) -> None:
    """With parameters in shards, of which no rank can call the model alone."""
    sharded = bloom_job("sharded", **SHARDED)
    complete = bloom_job("complete", zero_stage=0)
    outcome = train_on(sharded, 2)
    assert "bloom reads one row per response: slower" in outcome.note
    train_on(complete, 1)
    torch.testing.assert_close(logged(sharded), logged(complete), rtol=1e-5, atol=1e-5)


def test_budget_of_rows_that_are_not_packed_is_refused(bloom_job: MakeJob, tmp_path: Path) -> None:
    job = bloom_job("budget", max_tokens_per_device=64)
    (error,) = Ranks(job, 1, tmp_path).errors()
    assert "max_tokens_per_device was planned for packed rows" in error
    assert "model.packed_rows: off" in error
    off = dataclasses.replace(job, model=job.model.model_copy(update={"packed_rows": "off"}))
    assert Ranks(off, 1, tmp_path).outcome().step == 5
