"""A training on Ray: a TorchTrainer around `run_rank`, resumed by name."""

import logging
import os
import shutil
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray.train
import torch
from ray.train.torch import TorchConfig, TorchTrainer

from madpo_ray.config import ClusterConfig
from madpo_ray.data.micro_batches import open_tokens
from madpo_ray.data.order import Order
from madpo_ray.disk import explain_disk_error, find_disk_error
from madpo_ray.errors import (
    ExitCode,
    Stopped,
    StoppedForGood,
    StoppedFromOutside,
    UserError,
    first_line,
)
from madpo_ray.models.checks import check_weights
from madpo_ray.models.trainable import check_trainable
from madpo_ray.passes import BatchNotes, ordered_execution, require_no_refusal
from madpo_ray.restarts import Restarts
from madpo_ray.signals import on_sigterm
from madpo_ray.training.bar import training_bar
from madpo_ray.training.checkpoints import (
    CheckpointWriteError,
    newest_checkpoint,
    newest_step,
    warn_of_versions,
)
from madpo_ray.training.feed import datasets_of
from madpo_ray.training.job import TrainingJob
from madpo_ray.training.metrics import METRICS_FILE
from madpo_ray.training.protocols import NonFiniteError, Notice, Outcome
from madpo_ray.training.rank import run_rank
from madpo_ray.waiting import waiting

logger = logging.getLogger(__name__)

# Ray Train's time-outs, which it passes on to its controller and workers.
GROUP_START_TIMEOUT = "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"
COLLECTIVE_TIMEOUT = "RAY_TRAIN_COLLECTIVE_TIMEOUT_S"


class RaySite:
    """A rank of a TorchTrainer.

    Args:
        datasets: names of those that it reads, one after the other.
    """

    def __init__(self, datasets: Sequence[str]) -> None:
        self._datasets = datasets
        context = ray.train.get_context()
        self.rank = context.get_world_rank()
        self.world_size = context.get_world_size()

    def micro_batches(self, start_step: int) -> Iterator[pa.Table]:
        for name in self._datasets:
            shard = ray.train.get_dataset_shard(name)
            assert shard is not None
            # Whole chunks: for each batch Ray needs a millisecond.
            for chunk in shard.iter_batches(batch_size=None, batch_format="pyarrow"):
                require_no_refusal(chunk)
                for row in range(chunk.num_rows):
                    yield chunk.slice(row, 1)

    def report(self, numbers: dict[str, float]) -> None:
        ray.train.report(numbers)

    def node_is_leaving(self) -> bool:
        return ray.train.get_preemption_info() is not None


def _train_on_worker(spec: dict[str, Any]) -> Outcome:
    return run_rank(spec["job"], RaySite(spec["datasets"]))


def train_on_ray(
    job: TrainingJob, cluster: ClusterConfig, callbacks: Sequence[ray.train.UserCallback] = ()
) -> Outcome:
    """Runs a job to its end. A job of the same name resumes from its newest checkpoint.

    Args:
        callbacks: Ray Train's `UserCallback`s.

    Raises:
        UserError: the model cannot be trained as the settings say, as the driver or, once it is
            loaded, the workers found.
        Stopped: SIGTERM or the deadline came and the job has saved; a loss or gradient is not
            finite; a disk is full or broken; or the workers were not placed in time.
        ray.train.TrainingFailedError: the workers failed more than cluster.max_failures times
            without a new checkpoint, or twice with the same error at the same checkpoint.
    """
    # Fail before any worker starts.
    check_trainable(job.base_folder, job.model, job.settings, task_type=job.task.task_type)
    check_weights(job.base_folder, job.model, task_type=job.task.task_type)
    order = Order(job.order_spec(cluster.num_workers))
    for one in (order, Order(job.validation_order_spec(cluster.num_workers))):
        open_tokens(one).close()  # makes the files that the workers read

    # SIGTERM makes the workers save and exit.
    job.stop_file.parent.mkdir(parents=True, exist_ok=True)
    job.stop_file.write_text("")
    metrics_file = job.metrics / METRICS_FILE
    with (
        training_bar(job.stage, metrics_file, order.total_steps),
        waiting(_describe_wait(job, cluster), progress=lambda: _size(metrics_file)),
        on_sigterm(lambda: _ask_to_stop(job)) as terminated,
    ):
        outcome = _fit(job, cluster, order, callbacks, terminated)
    job.stop_file.unlink(missing_ok=True)

    # What it ended with.
    if outcome.note:
        logger.warning(outcome.note)
    saved = f"saved at step {outcome.step} of {order.total_steps}; the same command resumes there"
    if outcome.notice is Notice.OUT_OF_TIME:
        raise Stopped(f"run.max_wall_time is over: {saved}", ExitCode.OUT_OF_TIME)
    # The signal may have come too late for the workers, or someone else may have asked them.
    if terminated.is_set() or outcome.notice is Notice.TERMINATED:
        raise Stopped(f"received SIGTERM: {saved}", ExitCode.TERMINATED)
    if job.export:
        shutil.copytree(job.metrics, job.output, dirs_exist_ok=True)
    return outcome


def _ask_to_stop(job: TrainingJob) -> None:
    try:
        job.stop_file.write_text("SIGTERM\n")
    except OSError as error:  # raised here, it would appear inside whatever call of Ray's runs
        logger.error("cannot ask the workers to stop: %s", error)


def _describe_wait(job: TrainingJob, cluster: ClusterConfig) -> str:
    return (
        f"{job.stage} has logged nothing; its {cluster.num_workers} workers of "
        f"{cluster.worker_description} may be waiting for a place (`ray status` shows what is "
        f"free), loading the model, or in long steps (logging_steps: {job.settings.logging_steps})"
    )


def _size(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0


def _fit(
    job: TrainingJob,
    cluster: ClusterConfig,
    order: Order,
    callbacks: Sequence[ray.train.UserCallback],
    terminated: threading.Event,
) -> Outcome:
    """Runs the workers; restarts them after a failure that may be temporary."""
    # Ray Train reads them from the environment only; the config decides.
    os.environ[GROUP_START_TIMEOUT] = str(cluster.placement_timeout_s)
    os.environ[COLLECTIVE_TIMEOUT] = str(cluster.collective_timeout_s)
    notes = BatchNotes(job.checkpoints / "in-progress")
    restarts = Restarts(cluster.max_failures)
    newest = newest_checkpoint(job.checkpoints)  # here, so that its warnings are seen
    if newest is not None:
        warn_of_versions(newest.folder)
        logger.info("%s resumes at step %d of %d", job.stage, newest.step, order.total_steps)
    start_step = newest.step if newest else 0
    while True:
        trainer = _make_trainer(job, cluster, order, callbacks, start_step, notes)
        try:
            with notes.reporting_deaths():
                outcome = trainer.fit().return_value
        except SystemExit:  # what Ray Train's handler of SIGINT raises
            if terminated.is_set():
                raise
            raise KeyboardInterrupt from None
        except ray.train.TrainingFailedError as error:
            if terminated.is_set():
                message = "received SIGTERM, and the workers failed: the same command resumes"
                raise Stopped(message, ExitCode.TERMINATED) from error
            end_if_certain(error, cluster, job.checkpoints)
            start_step = newest_step(job.checkpoints)
            if is_preemption(error):
                logger.warning("a node was preempted: starting the workers again")
                continue
            cause, is_deterministic = failure_cause(error)
            if not restarts.record_failure(cause, start_step, is_deterministic=is_deterministic):
                raise
            continue
        assert isinstance(outcome, Outcome)
        return outcome


def _failures(error: ray.train.TrainingFailedError) -> list[BaseException]:
    """What went wrong, on each rank or in Ray Train's controller."""
    if isinstance(error, ray.train.WorkerGroupError):
        return list(error.worker_failures.values())
    if isinstance(error, ray.train.ControllerError):
        return [error.controller_failure]
    return [error]


def end_if_certain(
    error: ray.train.TrainingFailedError, cluster: ClusterConfig, folder: Path
) -> None:
    """Raises UserError or Stopped for a failure that a restart cannot change.

    Args:
        folder: of the run, whose free space is named if a disk is full.
    """
    for failure in _failures(error):
        if isinstance(failure, UserError):
            raise UserError(str(failure)) from error
        if isinstance(failure, NonFiniteError):
            raise StoppedForGood(str(failure), ExitCode.FAILED) from error
        if isinstance(failure, torch.OutOfMemoryError):
            raise Stopped(
                f"a micro-batch does not fit the memory of a GPU ({first_line(failure)}): lower "
                "per_device_train_batch_size, per_device_eval_batch_size or "
                "max_tokens_per_device, or set gradient_checkpointing or a higher zero_stage; "
                "`madpo-ray plan` computes what fits",
                ExitCode.FAILED,
            ) from error
        if isinstance(failure, CheckpointWriteError):
            raise StoppedFromOutside(str(failure), ExitCode.FAILED) from error
        if (broken := find_disk_error(failure)) is not None:
            message = explain_disk_error(broken, folder)
            raise StoppedFromOutside(message, ExitCode.FAILED) from error
        if type(failure).__name__ == "WorkerGroupStartupTimeoutError":  # not public
            raise StoppedFromOutside(
                f"the {cluster.num_workers} workers were not placed within "
                f"cluster.placement_timeout_s: {cluster.placement_timeout_s:g} seconds. The same "
                "command resumes",
                ExitCode.FAILED,
            ) from error


def is_preemption(error: ray.train.TrainingFailedError) -> bool:
    """Whether a node was taken away, announced or not."""
    if isinstance(error, ray.train.PreemptionError):
        return True
    # A lost worker's error is inside that of the health check that found out.
    deaths = [getattr(failure, "health_check_failure", failure) for failure in _failures(error)]
    return any(getattr(death, "preempted", False) for death in deaths)


def failure_cause(error: ray.train.TrainingFailedError) -> tuple[str, bool]:
    """One line with the reason why the workers failed, and whether it is likely to repeat.

    If a process was lost, that is the cause: the other ranks fail because it does not answer.
    """
    failures = _failures(error)
    lost = [failure for failure in failures if type(failure).__module__.startswith("ray.")]
    cause = (lost or failures)[0]
    return f"{type(cause).__name__}: {first_line(cause)}", not lost


def _make_trainer(
    job: TrainingJob,
    cluster: ClusterConfig,
    order: Order,
    callbacks: Sequence[ray.train.UserCallback],
    start_step: int,
    notes: BatchNotes,
) -> TorchTrainer:
    datasets = datasets_of(order, start_step, notes, job.streamed)
    return TorchTrainer(
        _train_on_worker,
        train_loop_config={"job": job, "datasets": list(datasets)},
        torch_config=TorchConfig(timeout_s=int(cluster.collective_timeout_s)),
        scaling_config=ray.train.ScalingConfig(
            num_workers=cluster.num_workers,
            use_gpu=cluster.use_gpu,
            resources_per_worker=cluster.worker_resources,
        ),
        datasets=dict(datasets),
        dataset_config=ray.train.DataConfig(
            datasets_to_split=list(datasets),
            execution_options=ordered_execution(),
            enable_shard_locality=False,
        ),
        run_config=ray.train.RunConfig(
            name=job.name,
            storage_path=str(job.storage),
            callbacks=list(callbacks) or None,
            # `_fit` decides about restarts, by what failed and how far the training came.
            failure_config=ray.train.FailureConfig(
                max_failures=0, controller_failure_limit=0, max_preemption_failures=0
            ),
        ),
    )
