"""Optimizer, schedule and clipping: the numbers of plain torch."""

import math
from typing import Any

import pytest
import torch

from madpo_ray.data.batching import collate
from madpo_ray.data.order import Order, decode_micro_batch
from madpo_ray.losses import madpo_loss
from madpo_ray.models.loading import load_policy
from madpo_ray.models.logprobs import ResponseLogps
from madpo_ray.training.engine import deepspeed_config
from madpo_ray.training.job import TrainingJob
from support.ranks import MakeJob, TrainOn, logged, weights_of

STEPS = 6
# Everything that could be forgotten or swapped shows: the clip is below every norm but one's.
SETTINGS: dict[str, Any] = {
    "max_steps": STEPS,
    "learning_rate": 2e-3,
    "warmup_steps": 2.0,
    "max_grad_norm": 0.4,
    "weight_decay": 0.3,
    "adam_beta1": 0.6,
    "adam_beta2": 0.8,
    "adam_epsilon": 1e-4,
}
SCHEDULES = {
    "cosine": [0, 0.5, 1, *(0.5 * (1 + math.cos(math.pi * i / 4)) for i in (1, 2, 3))],
    "linear": [0, 0.5, 1, 0.75, 0.5, 0.25],
    "constant_with_warmup": [0, 0.5, 1, 1, 1, 1],
    "constant": [1, 1, 1, 1, 1, 1],
}


def train_with_torch(
    job: TrainingJob, factors: list[float]
) -> tuple[dict[str, torch.Tensor], list[float], list[float]]:
    """Weights, losses and gradient norms of a loop without this package's engine or loop."""
    settings: Any = job.settings
    model = load_policy(job.base_folder, job.model)
    module = ResponseLogps(model)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.6, 0.8), eps=1e-4, weight_decay=0.3)
    order = Order(job.order_spec(1))
    losses, norms = [], []
    for step, factor in enumerate(factors):
        total = torch.zeros(())
        for number in range(order.first_micro_batch(step), order.first_micro_batch(step + 1)):
            pairs, place = decode_micro_batch(order.micro_batch(number))
            batch = collate(pairs, shared_prefix=True, column_names=job.task.columns)
            chosen, rejected = module(batch)["logps"].chunk(2)
            reference = batch.columns["ref_chosen_logps"] - batch.columns["ref_rejected_logps"]
            z = chosen - rejected - reference.float()
            loss = madpo_loss(
                z,
                batch.columns["margin"].float(),
                beta=settings.beta,
                c_min=settings.c_min,
                c_max=settings.c_max,
                lmbda=settings.lmbda,
                tau=settings.tau,
            )
            total = total + loss.sum() / place.pairs_in_step
        optimizer.zero_grad()
        total.backward()
        norm = math.sqrt(sum(float(p.grad.pow(2).sum()) for p in model.parameters()))
        for parameter in model.parameters():
            parameter.grad *= min(1.0, 0.4 / norm)
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * factor
        optimizer.step()
        losses.append(float(total.detach()))
        norms.append(norm)
    return dict(model.named_parameters()), losses, norms


@pytest.mark.deepspeed
@pytest.mark.parametrize(
    ("schedule", "changes", "world_size"),
    [
        ("cosine", {"zero_stage": 0}, 1),
        ("linear", {"zero_stage": 2}, 2),
        pytest.param("constant", {"zero_stage": 1}, 1, marks=pytest.mark.slow),
        pytest.param("constant_with_warmup", {"zero_stage": 3}, 2, marks=pytest.mark.slow),
    ],
)
def test_steps_are_those_of_plain_torch(
    schedule: str,
    changes: dict[str, Any],
    world_size: int,
    policy_job: MakeJob,
    train_on: TrainOn,
) -> None:
    job = policy_job("plain", **SETTINGS, lr_scheduler_type=schedule, **changes)
    train_on(job, world_size)
    factors = SCHEDULES[schedule]
    weights, losses, norms = train_with_torch(job, factors)
    assert min(norms) > 0.4, norms

    assert logged(job, "learning_rate").tolist() == pytest.approx([2e-3 * f for f in factors])
    assert logged(job).tolist() == pytest.approx(losses, rel=1e-5)
    assert logged(job, "grad_norm").tolist() == pytest.approx(norms, rel=1e-4)
    trained = weights_of(job)
    for name, weight in weights.items():
        if name in trained:  # a tied head is saved once
            torch.testing.assert_close(trained[name], weight.detach(), rtol=0, atol=2e-6)


def test_zero_clips_nothing() -> None:
    """DeepSpeed's 0 is no clipping as well."""
    from madpo_ray.config import PolicyConfig

    config = deepspeed_config(PolicyConfig(max_grad_norm=0.0), dtype="float32")
    assert config["gradient_clipping"] == 0
