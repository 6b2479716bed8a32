"""Optimizer, schedule and clipping: the numbers of plain torch."""

import datetime
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from madpo_ray.config import PolicyConfig
from madpo_ray.data.batching import collate
from madpo_ray.data.micro_batches import MicroBatchReader, decode_micro_batch
from madpo_ray.data.order import Order
from madpo_ray.losses import madpo_loss
from madpo_ray.models.loading import load_policy
from madpo_ray.models.logprobs import ResponseLogps
from madpo_ray.training.engine import DeepSpeedEngine, deepspeed_config
from madpo_ray.training.job import TrainingJob
from madpo_ray.training.sites import join_ranks
from support.ranks import MakeJob, TrainOn, logged, weights_of

STEPS = 6
TIMEOUT = datetime.timedelta(seconds=77)
# Everything that could be forgotten or swapped shows: the clip is below every norm.
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
SCHEDULES: dict[str, list[float]] = {
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
    optimizer = torch.optim.AdamW(
        model.parameters(),
        betas=(SETTINGS["adam_beta1"], SETTINGS["adam_beta2"]),
        eps=SETTINGS["adam_epsilon"],
        weight_decay=SETTINGS["weight_decay"],
    )
    order = Order(job.order_spec(1))
    reader = MicroBatchReader(order)
    losses, norms = [], []
    for step, factor in enumerate(factors):
        # The mean loss over the pairs of the step.
        total = torch.zeros(())
        for number in range(order.first_micro_batch(step), order.first_micro_batch(step + 1)):
            pairs, place = decode_micro_batch(reader.read([number]), order.spec.token_columns)
            batch = collate(pairs, packed=True, column_names=job.task.columns)
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

        # Its gradient, scaled down to the largest norm that the settings allow.
        optimizer.zero_grad()
        total.backward()
        norm = math.sqrt(sum(float(p.grad.pow(2).sum()) for p in model.parameters()))
        for parameter in model.parameters():
            parameter.grad *= min(1.0, (settings.max_grad_norm or math.inf) / norm)

        # A step at the scheduled rate.
        for group in optimizer.param_groups:
            group["lr"] = SETTINGS["learning_rate"] * factor
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
        # No clipping.
        pytest.param(
            "constant", {"zero_stage": 1, "max_grad_norm": 0.0}, 1, marks=pytest.mark.slow
        ),
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
    job = policy_job("plain", **{**SETTINGS, **changes}, lr_scheduler_type=schedule)
    train_on(job, world_size)
    factors = SCHEDULES[schedule]
    weights, losses, norms = train_with_torch(job, factors)
    assert min(norms) > 0.4, norms

    peak = SETTINGS["learning_rate"]
    expected = [peak * float(factor) for factor in factors]
    assert logged(job, "learning_rate").tolist() == pytest.approx(expected)
    assert logged(job).tolist() == pytest.approx(losses, rel=1e-5)
    assert logged(job, "grad_norm").tolist() == pytest.approx(norms, rel=1e-4)
    trained = weights_of(job)
    for name, weight in weights.items():
        if name in trained:  # a tied head is saved once
            torch.testing.assert_close(trained[name], weight.detach(), rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    ("dtype", "zero_stage", "sums_in_float32"),
    [("float32", 2, False), ("bfloat16", 1, False), ("bfloat16", 2, True), ("bfloat16", 3, True)],
)
def test_settings_of_deepspeed(dtype: str, zero_stage: int, sums_in_float32: bool) -> None:
    config = deepspeed_config(PolicyConfig(zero_stage=zero_stage), dtype=dtype)
    assert config["bf16"]["enabled"] == (dtype == "bfloat16")
    assert config.get("data_types") == ({"grad_accum_dtype": "fp32"} if sums_in_float32 else None)
    assert "overlap_comm" not in config["zero_optimization"]
    # Its clock waits for the device at every forward and step.
    assert config["timers"] == {"throughput": {"enabled": False}}


@pytest.mark.parametrize("overlap", [True, False])
def test_overlap_reaches_deepspeed(overlap: bool) -> None:
    config = deepspeed_config(PolicyConfig(overlap_comm=overlap), dtype="float32")
    assert config["zero_optimization"]["overlap_comm"] is overlap


def _report_timeouts(store: str, results: "torch.multiprocessing.Queue[object]") -> None:
    import deepspeed  # takes seconds

    join_ranks(0, 1, Path(store))
    cpu = torch.device("cpu")
    world = dist.group.WORLD
    assert world is not None
    dist.distributed_c10d._set_pg_timeout(TIMEOUT, world)
    timeouts = []
    initialize = deepspeed.initialize

    def noting_timeout(**options: Any) -> Any:
        group = deepspeed.utils.groups._get_sequence_data_parallel_group()
        timeouts.append(group._get_backend(cpu).options._timeout)
        return initialize(**options)

    deepspeed.initialize = noting_timeout
    settings = PolicyConfig(zero_stage=2)
    engine = DeepSpeedEngine(torch.nn.Linear(2, 1), settings, dtype="float32", total_steps=1)
    group = engine._engine.optimizer.dp_process_group
    timeouts.append(group._get_backend(cpu).options._timeout)
    results.put(timeouts)
    dist.destroy_process_group()


@pytest.mark.deepspeed
def test_zero_waits_as_long_as_the_world(tmp_path: Path) -> None:
    """From its first collective, inside `initialize`: on GPUs the default is ten minutes."""
    context = torch.multiprocessing.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=_report_timeouts, args=(str(tmp_path / "store"), results))
    process.start()
    assert results.get() == [TIMEOUT, TIMEOUT]
    process.join()
