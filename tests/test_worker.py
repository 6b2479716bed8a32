"""What every rank runs, on real ranks over gloo: the same numbers however many there are, kills, restarts, exports."""

import dataclasses
import itertools
import json
import math
import os
import random
import shutil
import signal
import time
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist
from conftest import Ranks
from safetensors.torch import load_file
from torch import Tensor

from madpo_ray import worker
from madpo_ray.batching import MicroBatch
from madpo_ray.config import Config, PolicyConfig
from madpo_ray.config_file import parse_config
from madpo_ray.engine import newest_checkpoint
from madpo_ray.loop import Notice, Terms
from madpo_ray.metrics import read_metrics
from madpo_ray.models import load_policy
from madpo_ray.plan import Plan
from madpo_ray.scoring import PairScorer
from madpo_ray.sft import SFTTask
from madpo_ray.tables import read_split
from madpo_ray.throughput import ModelFlops
from madpo_ray.train import BetaDPOObjective, PolicyObjective, PolicyTask
from madpo_ray.worker import Local, Noticeboard, Outcome, TrainingJob

pytestmark = pytest.mark.deepspeed

MakeJob = Callable[..., TrainingJob]
TrainOn = Callable[[TrainingJob, int], Outcome]
SHARDED = {"zero_stage": 3, "stage3_param_persistence_threshold": 0}
THIRTY_STEPS = {"max_steps": 30, "num_train_epochs": 9, "learning_rate": 1e-3}


def logged(job: TrainingJob, name: str = "loss") -> torch.Tensor:
    return torch.tensor([line[name] for line in read_metrics(job.metrics / "metrics.jsonl") if name in line])


def weights(job: TrainingJob) -> dict[str, torch.Tensor]:
    return load_file(job.output / "model" / "model.safetensors")


def assert_same_weights(one: TrainingJob, other: TrainingJob) -> None:
    a, b = weights(one), weights(other)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def calm(policy_job: MakeJob, train_on: TrainOn) -> TrainingJob:
    """Thirty undisturbed steps on one rank, whole steps at once."""
    job = policy_job("calm", **THIRTY_STEPS, per_device_train_batch_size=8)
    train_on(job, 1)
    assert len(logged(job)) == 30
    assert len(set(logged(job).tolist())) == 30
    return job


def test_neither_ranks_nor_accumulation_nor_zero_stage_change_a_loss(
    calm: TrainingJob, policy_job: MakeJob, train_on: TrainOn
) -> None:
    # The epoch's last step is short, so that some ranks have none of it.
    settings: dict[str, tuple[int, dict[str, Any]]] = {
        "two-pairs-at-a-time": (1, {"per_device_train_batch_size": 2}),
        "one-pair-at-a-time": (1, {"per_device_train_batch_size": 1}),
        "two-ranks": (2, {"per_device_train_batch_size": 4, "zero_stage": 0}),
        "three-ranks": (3, {"per_device_train_batch_size": 3, "zero_stage": 1}),
        "four-ranks": (4, {"per_device_train_batch_size": 2}),
        "budget": (2, {"max_tokens_per_device": 90}),
        "sharded": (2, {"per_device_train_batch_size": 3, **SHARDED}),
        "two-rows-a-pair": (2, {"model": {"shared_prefix": "off"}}),
        "offloaded": (2, {"zero_stage": 2, "offload_optimizer": True}),
        "all-offloaded": (2, {"offload_optimizer": True, "offload_param": True, **SHARDED}),
        "recomputed": (2, {"per_device_train_batch_size": 4, "gradient_checkpointing": True, **SHARDED}),
    }
    for name, (ranks, changes) in settings.items():
        job = policy_job(name, **THIRTY_STEPS, **changes)
        train_on(job, ranks)
        torch.testing.assert_close(
            logged(job), logged(calm), rtol=0, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}"
        )
        for key, weight in weights(job).items():
            torch.testing.assert_close(weight, weights(calm)[key], rtol=0, atol=1e-4)


def test_the_same_run_twice_is_bitwise_equal(calm: TrainingJob, policy_job: MakeJob, train_on: TrainOn) -> None:
    again = policy_job("again", **THIRTY_STEPS, per_device_train_batch_size=8)
    train_on(again, 1)
    assert torch.equal(logged(again), logged(calm))
    assert_same_weights(again, calm)


def kill_at(job: TrainingJob, ranks: Ranks, step: int, victims: list[int], *, after: float) -> None:
    """kill -9 of some ranks, `after` seconds from when the metrics first show a step."""
    while not any(line["step"] >= step for line in read_metrics(job.metrics / "metrics.jsonl")):
        assert any(process.is_alive() for process in ranks.processes)
        time.sleep(0.002)
    time.sleep(after)
    for rank in victims:
        os.kill(ranks.processes[rank].pid, signal.SIGKILL)


class Recording(PolicyObjective):
    """A loss that writes down which pairs it was asked about in which step of training."""

    def __init__(self, settings: PolicyConfig, record: Path) -> None:
        super().__init__(settings)
        self._record = record / f"{os.getpid()}.jsonl"

    def __call__(self, outputs: Mapping[str, Tensor], batch: MicroBatch, *, training: bool) -> Terms:
        if training:
            with self._record.open("a") as stream:
                stream.write(json.dumps([batch.step, batch.pair_ids]) + "\n")
        return super().__call__(outputs, batch, training=training)


@dataclasses.dataclass(frozen=True)
class RecordingTask(PolicyTask):
    record: Path = Path()

    def objective(self, config: Config) -> Recording:
        return Recording(config.train, self.record)


def assert_each_epoch_read_every_pair(record: Path, job: TrainingJob, epochs: int) -> None:
    everyone = read_split(job.source, "train", ("pair_id",))["pair_id"].to_pylist()
    per_epoch = -(-len(everyone) // 8)
    lines = [line for file in record.iterdir() for line in file.read_text().splitlines(keepends=True)]
    read: dict[int, set[str]] = {}
    for step, ids in (json.loads(line) for line in lines if line.endswith("\n")):
        read.setdefault(step, set()).update(ids)
    for epoch in range(epochs):
        steps = [read[step] for step in range(epoch * per_epoch, (epoch + 1) * per_epoch)]
        assert sum(map(len, steps)) == len(everyone)  # a step that was repeated read the same pairs again
        assert set().union(*steps) == set(everyone)


@pytest.mark.parametrize(
    "victims", [pytest.param([1], marks=pytest.mark.slow), pytest.param([0], marks=pytest.mark.slow), [0, 1]]
)
def test_killed_ranks_resume_to_the_same_weights(
    victims: list[int], policy_job: MakeJob, train_on: TrainOn, tmp_path: Path
) -> None:
    settings = {"num_train_epochs": 2, "max_steps": -1, "save_steps": 2, "zero_stage": 2}
    undisturbed = policy_job("undisturbed", **settings)
    train_on(undisturbed, 2)
    rng = random.Random(sum(victims) + len(victims))
    for draw in range(5):
        record = tmp_path / f"record-{draw}"
        record.mkdir()
        job = policy_job(f"killed-{draw}", **settings)
        job = dataclasses.replace(job, task=RecordingTask(columns=job.task.columns, record=record))
        ranks = Ranks(job, 2, tmp_path)
        # A step is logged, then saved: some milliseconds after the log of an even step lie within a save.
        step = rng.randint(2, 10)
        kill_at(job, ranks, step, victims, after=rng.uniform(0, 0.1))
        assert -signal.SIGKILL in ranks.join()
        assert train_on(job, 2).step == len(logged(undisturbed))
        assert torch.equal(logged(job), logged(undisturbed))
        assert_same_weights(job, undisturbed)
        assert_each_epoch_read_every_pair(record, job, epochs=2)
        killed = {f"{process.pid}.jsonl" for process in ranks.processes}
        again = [file for file in record.iterdir() if file.name not in killed]
        # From the newest checkpoint, or the one before where the kill tore that.
        assert min(json.loads(file.read_text().splitlines()[0])[0] for file in again) >= step - 2


def test_beta_dpo_goes_on_with_its_running_statistics(policy_job: MakeJob, train_on: TrainOn) -> None:
    settings = {"loss_type": "beta_dpo", "max_steps": 9, "num_train_epochs": 2}
    undisturbed, job = policy_job("undisturbed", **settings), policy_job("interrupted", **settings)
    train_on(undisturbed, 2)
    job.stop_file.parent.mkdir(parents=True)
    for step in range(1, 5):
        job.stop_file.write_text("SIGTERM")
        assert train_on(job, 2) == Outcome(step, Notice.TERMINATED)
    job.stop_file.unlink()
    train_on(job, 2)
    assert torch.equal(logged(job), logged(undisturbed))
    assert_same_weights(job, undisturbed)


def test_a_run_reads_each_pair_of_an_epoch_once(policy_job: MakeJob) -> None:
    job = policy_job("read", num_train_epochs=2, max_steps=-1)
    plan = Plan(job.plan(num_workers=3))
    rows = [plan.row(number).to_pylist()[0] for number in range(plan.num_rows)]
    epochs = [[i for row in rows if row["step"] // plan.steps_per_epoch == e for i in row["pair_id"]] for e in (0, 1)]
    everyone = read_split(job.source, "train", ("pair_id",))["pair_id"].to_pylist()
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(everyone)
    assert epochs[0] != epochs[1]


def test_a_torn_checkpoint_is_passed_over(
    policy_job: MakeJob, train_on: TrainOn, caplog: pytest.LogCaptureFixture
) -> None:
    settings = {"max_steps": 6, "save_steps": 2}
    job = policy_job("torn", **settings)
    train_on(job, 2)
    finished = weights(job)
    newest = sorted(job.checkpoints.glob("checkpoint_*"))[-1]
    part = next(newest.rglob("*optim_states.pt"))
    part.write_bytes(part.read_bytes()[:-1])
    found = newest_checkpoint(job.checkpoints)
    assert found is not None
    assert found[0] == 4
    assert "is torn or was changed" in caplog.text
    train_on(job, 2)
    assert all(torch.equal(weight, finished[name]) for name, weight in weights(job).items())


@pytest.mark.parametrize(
    "zero",
    [
        pytest.param({"zero_stage": 0}, marks=pytest.mark.slow),
        pytest.param({"zero_stage": 1}, marks=pytest.mark.slow),
        {"zero_stage": 2},
        SHARDED,
    ],
)
def test_a_run_goes_on_with_another_number_of_ranks(
    zero: dict[str, Any], calm: TrainingJob, policy_job: MakeJob, train_on: TrainOn, tmp_path: Path
) -> None:
    job = policy_job("two-ranks", **THIRTY_STEPS, **zero, save_steps=10)
    Ranks(job, 2, tmp_path).kill_when(lambda: newest_checkpoint(job.checkpoints))
    assert newest_checkpoint(job.checkpoints)[0] < 30  # type: ignore[index]
    for number in (1, 4):
        resized = dataclasses.replace(job, experiment=f"resumed-on-{number}", output=tmp_path / f"resumed-on-{number}")
        shutil.copytree(job.checkpoints, resized.checkpoints)
        assert train_on(resized, number) == Outcome(30)
        torch.testing.assert_close(logged(resized), logged(calm), rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("zero", [{"zero_stage": 2}, SHARDED])
def test_lora_goes_on_with_another_number_of_ranks(
    zero: dict[str, Any], policy_job: MakeJob, train_on: TrainOn, tmp_path: Path
) -> None:
    lora = {**THIRTY_STEPS, **zero, "use_peft": True, "lora_r": 4, "save_steps": 10}
    whole, job = policy_job("whole", **lora), policy_job("lora", **lora)
    train_on(whole, 2)
    Ranks(job, 2, tmp_path).kill_when(lambda: newest_checkpoint(job.checkpoints))
    assert newest_checkpoint(job.checkpoints)[0] < 30  # type: ignore[index]
    assert train_on(job, 1) == Outcome(30)
    torch.testing.assert_close(logged(job), logged(whole), rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_bfloat16_goes_on_with_another_number_of_ranks(
    stage: int, policy_job: MakeJob, train_on: TrainOn, tmp_path: Path
) -> None:
    settings = {**THIRTY_STEPS, **SHARDED, "zero_stage": stage, "save_steps": 10}
    job, whole = (policy_job(name, {"dtype": "bfloat16"}, **settings) for name in ("bf16", "whole"))
    train_on(whole, 2)
    Ranks(job, 2, tmp_path).kill_when(lambda: newest_checkpoint(job.checkpoints))
    saved = newest_checkpoint(job.checkpoints)[0]  # type: ignore[index]
    assert saved < 30
    assert train_on(job, 1) == Outcome(30)
    # Weights and moments are carried over whole; sums over ranks round otherwise in bfloat16.
    near = slice(saved, saved + 3)
    torch.testing.assert_close(logged(job)[near], logged(whole)[near], rtol=0, atol=0.02)
    assert (logged(whole)[near] - math.log(2)).abs().min() > 0.04  # what weights of the start would give


def test_told_to_leave_a_run_saves_and_goes_on_when_started_again(
    calm: TrainingJob, policy_job: MakeJob, train_on: TrainOn
) -> None:
    job = policy_job("interrupted", **THIRTY_STEPS)
    job.stop_file.parent.mkdir(parents=True)
    job.stop_file.write_text("SIGTERM")
    assert train_on(job, 2) == Outcome(1, Notice.TERMINATED)
    job.stop_file.unlink()
    assert train_on(dataclasses.replace(job, deadline=time.time()), 2) == Outcome(2, Notice.OUT_OF_TIME)
    assert not (job.output / "model").exists()
    assert train_on(job, 2) == Outcome(30)
    torch.testing.assert_close(logged(job), logged(calm), rtol=0, atol=1e-5)


class OneAtATime(PolicyTask):
    """A policy's training that never holds two models."""

    loaded: ClassVar[list[weakref.ref[torch.nn.Module]]] = []

    def load(self, config: Config, base: Path, max_response_tokens: int) -> torch.nn.Module:
        assert all(module() is None for module in self.loaded)
        module = super().load(config, base, max_response_tokens)
        self.loaded.append(weakref.ref(module))
        return module


def test_the_best_evaluation_is_the_result_and_patience_ends_a_run(policy_job: MakeJob, train_on: TrainOn) -> None:
    best = {"eval_steps": 2, "metric_for_best_model": "eval_loss", "early_stopping_patience": 3}
    job = policy_job("best", num_train_epochs=20, max_steps=40, learning_rate=3e-2, **best, **SHARDED)
    job = dataclasses.replace(job, task=OneAtATime(columns=job.task.columns))
    outcome = train_on(job, 2)
    losses = logged(job, "eval_loss")
    assert outcome.step == 2 * (int(losses.argmin()) + 1)
    assert len(losses) == int(losses.argmin()) + 1 + 3
    # What was exported is the best step's policy, not the last's: its log-probs say so.
    seen = outcome.evaluation(read_metrics(job.metrics / "metrics.jsonl"))
    assert seen["eval_loss"] == pytest.approx(float(losses.min()))
    chosen = log_probs(job.output / "model", job).view(-1, 2)[:, 0].mean()
    assert float(chosen) == pytest.approx(seen["eval_logps/chosen"], rel=1e-5)
    again = train_on(dataclasses.replace(job, output=job.output.with_name("exported-again")), 2)
    assert again == outcome


def log_probs(folder: Path, job: TrainingJob) -> torch.Tensor:
    """Chosen and rejected log-probs, in turn, of the held-out pairs under an exported policy, by plain transformers."""
    model = load_policy(folder, job.config.model).eval()
    rows = read_split(job.source, "validation", ("prompt_ids", "chosen_ids", "rejected_ids")).to_pylist()
    logps = []
    with torch.no_grad():
        for row in rows:
            for name in ("chosen_ids", "rejected_ids"):
                ids = torch.tensor([row["prompt_ids"] + row[name]])
                logits = model(input_ids=ids).logits[0, len(row["prompt_ids"]) - 1 : -1].log_softmax(-1)
                logps.append(logits.gather(-1, torch.tensor(row[name])[:, None]).sum())
    return torch.stack(logps)


@pytest.mark.parametrize("zero", [{"zero_stage": 2}, SHARDED])
def test_exports_give_the_log_probs_that_training_saw(
    zero: dict[str, Any], policy_job: MakeJob, train_on: TrainOn
) -> None:
    lora = {"use_peft": True, "lora_r": 4, "learning_rate": 1e-2}
    jobs = {
        "whole": policy_job("whole", **zero),
        "adapter": policy_job("adapter", **zero, **lora),
        "merged": policy_job("merged", **zero, **lora, merge_adapter=True),
    }
    for job in jobs.values():
        train_on(job, 2)
        seen = read_metrics(job.metrics / "metrics.jsonl")[-1]
        chosen, rejected = log_probs(job.output / "model", job).view(-1, 2).mean(0)
        assert float(chosen) == pytest.approx(seen["eval_logps/chosen"], rel=1e-6)
        assert float(rejected) == pytest.approx(seen["eval_logps/rejected"], rel=1e-6)
    assert (jobs["adapter"].output / "model" / "adapter_config.json").exists()
    assert not (jobs["merged"].output / "model" / "adapter_config.json").exists()
    merged, adapter = (log_probs(jobs[name].output / "model", jobs[name]) for name in ("merged", "adapter"))
    torch.testing.assert_close(merged, adapter, rtol=0, atol=1e-4)


def test_parameters_are_partitioned_under_zero_3(policy_job: MakeJob, train_on: TrainOn) -> None:
    job = policy_job("partitioned", **SHARDED, max_steps=1)
    train_on(dataclasses.replace(job, task=Partitioned(columns=job.task.columns)), 2)


class Partitioned(PolicyTask):
    """A policy's training that looks at its own parameters, in the midst of it."""

    def load(self, config: Config, base: Path, max_response_tokens: int) -> torch.nn.Module:
        module = super().load(config, base, max_response_tokens)
        # Already before DeepSpeed starts: constructed and filled in shards.
        assert all(parameter.numel() == 0 for parameter in module.parameters())
        sizes = [parameter.ds_tensor.numel() for parameter in module.parameters()]
        linear = [p.ds_numel for name, p in module.named_parameters() if "_proj" in name]
        assert ModelFlops(module.model)._per_token == 6 * sum(linear)
        assert sum(sizes) <= 0.51 * sum(parameter.ds_numel for parameter in module.parameters())
        return module


def test_bfloat16_with_recomputation_starts_at_ln_2(policy_job: MakeJob, train_on: TrainOn, tmp_path: Path) -> None:
    bfloat16 = {"dtype": "bfloat16"}
    job = policy_job("bf16", bfloat16, zero_stage=1, gradient_checkpointing=True, loss_type="sigmoid")
    table = read_split(job.source, "train", ("pair_id", "prompt_ids", "chosen_ids", "rejected_ids", "margin"))
    held_out = read_split(job.source, "validation", tuple(table.column_names))
    scorer = PairScorer(model=job.config.model, micro_batch_size=2, num_threads=1, policies={"ref_": job.base})
    source = tmp_path / "bf16-source"
    source.mkdir()
    for split, part in {"train": table, "validation": held_out}.items():
        scored = scorer(part).append_column("split", pa.array([split] * part.num_rows))
        pq.write_table(scored, source / f"{split}.parquet")
    train_on(dataclasses.replace(job, source=source), 1)
    # Other micro-batches pad rows to other lengths, which bfloat16 sees: log-probs of -30 or so, to 8 bits.
    assert float(logged(job)[0]) == pytest.approx(math.log(2), abs=0.02)
    assert all(math.isfinite(value) for value in logged(job, "grad_norm").tolist())


def test_sft_learns_the_chosen_responses(policy_job: MakeJob, train_on: TrainOn) -> None:
    job = policy_job("sft")
    raw = job.config.model_dump()
    raw["sft"] = {"learning_rate": 1e-2, "global_batch_size": 8, "num_train_epochs": 4, "logging_steps": 1}
    job = dataclasses.replace(job, task=SFTTask(), config=parse_config(raw))
    train_on(job, 2)
    losses = logged(job)
    assert losses[-1] < losses[0] / 2
    rows = read_split(job.source, "validation", ("prompt_ids", "chosen_ids", "rejected_ids")).to_pylist()
    chosen = log_probs(job.output / "model", job).view(-1, 2)[:, 0].sum()
    tokens = sum(len(row["chosen_ids"]) for row in rows)
    assert -float(chosen) / tokens == pytest.approx(float(logged(job, "eval_loss")[-1]), abs=1e-5)


class PoisonedObjective(PolicyObjective):
    """Spoils rank 0's loss, or its gradient alone (the square root at 0), in the second step."""

    def __init__(self, settings: PolicyConfig, poison: str) -> None:
        super().__init__(settings)
        self._poison = poison

    def __call__(self, outputs: Mapping[str, Tensor], batch: MicroBatch, *, training: bool) -> Terms:
        terms = super().__call__(outputs, batch, training=training)
        if not training or batch.step != 1 or dist.get_rank() != 0:
            return terms
        if self._poison == "loss":
            return Terms(terms.loss * torch.inf, terms.metrics)
        return Terms(terms.loss + (terms.loss - terms.loss.detach()).sqrt(), terms.metrics)


@dataclasses.dataclass(frozen=True)
class PoisonedTask(PolicyTask):
    poison: str = ""

    def objective(self, config: Config) -> PoisonedObjective:
        return PoisonedObjective(config.train, self.poison)


def not_finite_cases() -> list[Any]:
    quick = [(0, "float32", "loss"), (2, "float32", "gradient"), (3, "bfloat16", "loss")]
    cases = []
    for stage, dtype, poison in itertools.product([0, 1, 2, 3], ["float32", "bfloat16"], ["loss", "gradient"]):
        zero = {"zero_stage": stage, "stage3_param_persistence_threshold": 0}
        marks = [] if (stage, dtype, poison) in quick else [pytest.mark.slow]
        cases.append(pytest.param(zero, dtype, poison, marks=marks, id=f"zero-{stage}-{dtype}-{poison}"))
    return cases


@pytest.mark.parametrize(("zero", "dtype", "poison"), not_finite_cases())
def test_what_is_not_finite_stops_the_run_or_is_left_out(
    zero: dict[str, Any], dtype: str, poison: str, policy_job: MakeJob, train_on: TrainOn, tmp_path: Path
) -> None:
    settings = {**zero, "lr_scheduler_type": "constant", "save_steps": 1}

    def poisoned(name: str, **changes: Any) -> TrainingJob:
        job = policy_job(name, {"dtype": dtype}, **settings, max_steps=2, **changes)
        return dataclasses.replace(job, task=PoisonedTask(columns=job.task.columns, poison=poison))

    one_step = policy_job("one-step", {"dtype": dtype}, **settings, max_steps=1)
    train_on(one_step, 2)
    lenient = poisoned("lenient", skip_nonfinite=1)
    assert train_on(lenient, 2) == Outcome(2)
    assert_same_weights(lenient, one_step)  # the optimizer has not moved
    assert read_metrics(lenient.metrics / "metrics.jsonl")[-2]["skipped_steps"] == 1

    strict = poisoned("strict")
    said = Ranks(strict, 2, tmp_path).errors()
    assert len(said) == 2
    assert said[0] == said[1]  # every rank names the pairs of all
    assert f"the {poison}" in said[0]
    assert "of step 2 is" in said[0]
    assert said[0].count("pair-") == 8
    assert "The last good checkpoint is step 1's" in said[0]


class LeavingNode(Local):
    """A place whose node is about to be taken away."""

    def node_is_leaving(self) -> bool:
        return True


def test_a_node_that_leaves_is_saved_for_once(
    policy_job: MakeJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "PREEMPTION_POLL_S", 0.0)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        job = policy_job("leaving")
        board = Noticeboard(job, LeavingNode(job), torch.device("cpu"))
        assert [board(), board()] == [Notice.SAVE, Notice.NONE]
        calm = Noticeboard(job, Local(job), torch.device("cpu"))
        assert calm() is Notice.NONE
    finally:
        dist.destroy_process_group()


class SpoiledBetaDPO(BetaDPOObjective):
    """Sees one gap that is not finite, in the second step."""

    def __call__(self, outputs: Mapping[str, Tensor], batch: MicroBatch, *, training: bool) -> Terms:
        if training and batch.step == 1 and dist.get_rank() == 0:
            outputs = {**outputs, "logps": outputs["logps"] * torch.inf}
        return super().__call__(outputs, batch, training=training)


class SpoiledBetaDPOTask(PolicyTask):
    def objective(self, config: Config) -> SpoiledBetaDPO:
        return SpoiledBetaDPO(config.train, config.run.seed)


@pytest.mark.parametrize("variant", ["published", "madpo_paper"])
def test_running_statistics_forget_a_step_that_is_left_out(
    variant: str, policy_job: MakeJob, train_on: TrainOn
) -> None:
    job = policy_job("spoiled", loss_type="beta_dpo", beta_dpo_variant=variant, max_steps=4, skip_nonfinite=1)
    train_on(dataclasses.replace(job, task=SpoiledBetaDPOTask(columns=job.task.columns)), 2)
    folder = newest_checkpoint(job.checkpoints)
    assert folder is not None
    state = torch.load(folder[1] / "rank-0.pt", weights_only=False)
    assert state["progress"]["skipped"] == 1
    assert all(torch.isfinite(value) for value in state["objective"]["statistics"])
    assert len(logged(job)) == 3
    assert torch.isfinite(logged(job)).all()
