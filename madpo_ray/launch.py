"""A training on Ray: TorchTrainer around `train_rank`, fed by the plan's dataset, resumed by name."""

import contextlib
import dataclasses
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from madpo_ray.cluster import ordered_execution, worker_resources
from madpo_ray.config import ExitCode, Stopped
from madpo_ray.engine import newest_checkpoint
from madpo_ray.loop import NonFiniteError, Notice
from madpo_ray.models import check_trainable
from madpo_ray.plan import Plan, micro_batch_dataset
from madpo_ray.progress import training_progress
from madpo_ray.worker import Outcome, TrainingJob, train_rank

# How long ranks wait for rank 0 where it works alone: hashing a large checkpoint, or converting it for another number
# of ranks. A rank that dies is seen at once; Ray looks after that.
COLLECTIVE_TIMEOUT_S = 2 * 3600
# run.max_wall_time counts from here: this is imported when a command starts.
_BEGAN = time.time()


class RaySite:
    """A rank of a TorchTrainer."""

    def __init__(self) -> None:
        import ray.train

        context = ray.train.get_context()
        self.rank, self.world_size = context.get_world_rank(), context.get_world_size()

    def rows(self, start_step: int) -> Iterator[pa.Table]:
        import ray.train

        shard = ray.train.get_dataset_shard("train")
        assert shard is not None
        yield from shard.iter_batches(batch_size=1, batch_format="pyarrow", prefetch_batches=4)

    def report(self, numbers: dict[str, float], checkpoint: Path | None) -> None:
        import ray.train

        part = ray.train.Checkpoint.from_directory(checkpoint) if checkpoint else None
        ray.train.report(numbers, checkpoint=part)

    def node_is_leaving(self) -> bool:
        import ray.train

        return ray.train.get_preemption_info() is not None


def _train_on_rank(spec: dict[str, TrainingJob]) -> Outcome:
    try:
        return train_rank(spec["job"], RaySite())
    except NonFiniteError as error:  # on every rank, and again after a restart: nothing that Ray should retry
        return Outcome(0, failure=str(error))


def train_on_ray(job: TrainingJob, callbacks: list[Any] | None = None) -> Outcome:
    """Runs a job to its end; one of the same name goes on from its newest checkpoint.

    Raises:
        UserError: the model cannot be trained as the settings say.
        Stopped: SIGTERM came or run.max_wall_time is over, and the job has saved; or a loss or gradient is not finite.
        ray.train.TrainingFailedError: the workers failed more often than cluster.max_failures allows.
    """
    import ray.train
    from ray.train.torch import TorchConfig, TorchTrainer

    cluster, limit = job.config.cluster, job.config.run.max_wall_time
    job = dataclasses.replace(job, deadline=None if limit is None else _BEGAN + limit)
    check_trainable(job.base, job.config.model, job.settings, task_type=job.task.task_type)
    spec = job.plan(cluster.num_workers)
    plan = Plan(spec)
    Plan(job.plan(cluster.num_workers, split="validation"))  # what is wrong with it is told before workers start

    def dataset() -> Any:  # evaluated anew whenever the workers start, so it goes on where they do
        newest = newest_checkpoint(job.checkpoints)
        return micro_batch_dataset(spec, newest[0] if newest else 0)

    trainer = TorchTrainer(
        _train_on_rank,
        train_loop_config={"job": job},
        torch_config=TorchConfig(timeout_s=COLLECTIVE_TIMEOUT_S),
        scaling_config=ray.train.ScalingConfig(
            num_workers=cluster.num_workers, use_gpu=cluster.use_gpu, resources_per_worker=worker_resources(cluster)
        ),
        datasets={"train": dataset},
        dataset_config=ray.train.DataConfig(
            datasets_to_split=["train"], execution_options=ordered_execution(), enable_shard_locality=False
        ),
        run_config=ray.train.RunConfig(
            name=job.checkpoints.name,
            storage_path=str(job.checkpoints.parent),
            callbacks=callbacks,
            checkpoint_config=ray.train.CheckpointConfig(
                num_to_keep=job.settings.save_total_limit,
                # Ray deletes the lowest score first, and never the newest.
                checkpoint_score_attribute="best" if job.settings.metric_for_best_model else None,
            ),
            failure_config=ray.train.FailureConfig(
                max_failures=cluster.max_failures, controller_failure_limit=-1 if cluster.autoscaling else 3
            ),
        ),
    )
    progress = training_progress(job.experiment.split("-")[0], job.metrics / "metrics.jsonl", plan.total_steps)
    with progress, _sigterm_stops(job) as terminated:
        outcome = trainer.fit().return_value
    assert isinstance(outcome, Outcome)
    if outcome.failure:
        raise Stopped(outcome.failure, ExitCode.FAILED)
    saved = f"saved at step {outcome.step} of {plan.total_steps}; the same command goes on from there"
    if outcome.notice is Notice.OUT_OF_TIME:
        raise Stopped(f"run.max_wall_time: {limit:g} s are over: {saved}", ExitCode.OUT_OF_TIME)
    if terminated.is_set():  # perhaps too late for the workers to hear
        raise Stopped(f"SIGTERM came: {saved}", ExitCode.TERMINATED)
    if job.export:
        shutil.copytree(job.metrics, job.output, dirs_exist_ok=True)
    return outcome


@contextlib.contextmanager
def _sigterm_stops(job: TrainingJob) -> Iterator[threading.Event]:
    """While in the block, a first SIGTERM has the workers save and leave, and sets the event; a second one does what
    it did before."""
    terminated = threading.Event()
    job.stop_file.parent.mkdir(parents=True, exist_ok=True)
    job.stop_file.write_text("")
    if threading.current_thread() is not threading.main_thread():  # a trial of Tune; signals are its driver's
        yield terminated
        return
    before = signal.getsignal(signal.SIGTERM)

    def stop(*_: Any) -> None:
        signal.signal(signal.SIGTERM, before)
        terminated.set()
        job.stop_file.write_text("SIGTERM\n")

    signal.signal(signal.SIGTERM, stop)
    try:
        yield terminated
    finally:
        signal.signal(signal.SIGTERM, before)
        job.stop_file.unlink(missing_ok=True)
