"""A training on Ray: a TorchTrainer around `run_rank`, resumed by name."""

import logging
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray.data
import ray.train
from ray.train.torch import TorchConfig, TorchTrainer

from madpo_ray.cluster import ordered_execution, worker_resources
from madpo_ray.config import ClusterConfig
from madpo_ray.data.order import Order
from madpo_ray.errors import ExitCode, Stopped, UserError
from madpo_ray.models.loading import check_weights
from madpo_ray.models.trainable import check_trainable
from madpo_ray.signals import on_sigterm
from madpo_ray.training.bar import training_bar
from madpo_ray.training.checkpoints import newest_checkpoint
from madpo_ray.training.feed import micro_batch_dataset
from madpo_ray.training.job import TrainingJob
from madpo_ray.training.metrics import METRICS_FILE
from madpo_ray.training.protocols import NonFiniteError, Notice
from madpo_ray.training.rank import Outcome, run_rank

logger = logging.getLogger(__name__)

# How long ranks wait for rank 0 while it hashes a large checkpoint, or converts it for another
# number of ranks. Ray notices a rank that dies at once.
COLLECTIVE_TIMEOUT_S = 2 * 3600


class RaySite:
    """A rank of a TorchTrainer."""

    def __init__(self) -> None:
        context = ray.train.get_context()
        self.rank = context.get_world_rank()
        self.world_size = context.get_world_size()

    def micro_batches(self, start_step: int) -> Iterator[pa.Table]:
        shard = ray.train.get_dataset_shard("train")
        assert shard is not None
        yield from shard.iter_batches(batch_size=1, batch_format="pyarrow", prefetch_batches=4)

    def report(self, numbers: dict[str, float], checkpoint: Path | None) -> None:
        part = ray.train.Checkpoint.from_directory(checkpoint) if checkpoint else None
        ray.train.report(numbers, checkpoint=part)

    def node_is_leaving(self) -> bool:
        return ray.train.get_preemption_info() is not None


def _train_on_worker(spec: dict[str, TrainingJob]) -> Outcome:
    try:
        return run_rank(spec["job"], RaySite())
    except (NonFiniteError, UserError) as error:  # on every rank, and again after a restart
        return Outcome(0, failure=str(error), is_user_error=isinstance(error, UserError))


def train_on_ray(
    job: TrainingJob, cluster: ClusterConfig, callbacks: Sequence[Any] = ()
) -> Outcome:
    """Runs a job to its end. A job of the same name resumes from its newest checkpoint.

    Args:
        callbacks: Ray Train's `UserCallback`s.

    Raises:
        UserError: the model cannot be trained as the settings say, as the driver or, once it is
            loaded, the workers found.
        Stopped: SIGTERM or the deadline came and the job has saved, or a loss or gradient is not
            finite.
        ray.train.TrainingFailedError: the workers failed more often than cluster.max_failures.
    """
    # Fail before any worker starts.
    check_trainable(job.base_folder, job.model, job.settings, task_type=job.task.task_type)
    check_weights(job.base_folder, job.model, task_type=job.task.task_type)
    order = Order(job.order_spec(cluster.num_workers))
    Order(job.validation_order_spec(cluster.num_workers))

    # SIGTERM makes the workers save and exit.
    job.stop_file.parent.mkdir(parents=True, exist_ok=True)
    job.stop_file.write_text("")
    trainer = _trainer(job, cluster, order, callbacks)
    with (
        training_bar(job.stage, job.metrics / METRICS_FILE, order.total_steps),
        on_sigterm(lambda: _ask_to_stop(job)) as terminated,
    ):
        outcome = trainer.fit().return_value
    job.stop_file.unlink(missing_ok=True)
    assert isinstance(outcome, Outcome)

    # What it ended with.
    if outcome.note:
        logger.warning(outcome.note)
    if outcome.is_user_error:
        raise UserError(outcome.failure)
    if outcome.failure:
        raise Stopped(outcome.failure, ExitCode.FAILED)
    saved = f"saved at step {outcome.step} of {order.total_steps}; the same command resumes there"
    if outcome.notice is Notice.OUT_OF_TIME:
        raise Stopped(f"run.max_wall_time is over: {saved}", ExitCode.OUT_OF_TIME)
    if terminated.is_set():  # perhaps too late for the workers to notice
        raise Stopped(f"received SIGTERM: {saved}", ExitCode.TERMINATED)
    if job.export:
        shutil.copytree(job.metrics, job.output, dirs_exist_ok=True)
    return outcome


def _ask_to_stop(job: TrainingJob) -> None:
    job.stop_file.write_text("SIGTERM\n")


def _trainer(
    job: TrainingJob, cluster: ClusterConfig, order: Order, callbacks: Sequence[Any]
) -> TorchTrainer:
    spec = job.order_spec(cluster.num_workers)
    first_micro_batches = order.first_micro_batches

    def dataset() -> ray.data.Dataset:
        # Called at every (re)start of the workers, so that the data resumes at the same step as
        # they do.
        newest = newest_checkpoint(job.checkpoints)
        return micro_batch_dataset(spec, first_micro_batches, newest[0] if newest else 0)

    return TorchTrainer(
        _train_on_worker,
        train_loop_config={"job": job},
        torch_config=TorchConfig(timeout_s=COLLECTIVE_TIMEOUT_S),
        scaling_config=ray.train.ScalingConfig(
            num_workers=cluster.num_workers,
            use_gpu=cluster.use_gpu,
            resources_per_worker=worker_resources(cluster),
        ),
        datasets={"train": dataset},
        dataset_config=ray.train.DataConfig(
            datasets_to_split=["train"],
            execution_options=ordered_execution(),
            enable_shard_locality=False,
        ),
        run_config=ray.train.RunConfig(
            name=job.name,
            storage_path=str(job.storage),
            callbacks=list(callbacks) or None,
            checkpoint_config=ray.train.CheckpointConfig(
                num_to_keep=job.settings.save_total_limit,
                # Ray deletes the lowest score first, and never the newest.
                checkpoint_score_attribute="best" if job.settings.metric_for_best_model else None,
            ),
            failure_config=ray.train.FailureConfig(
                max_failures=cluster.max_failures,
                controller_failure_limit=-1 if cluster.autoscaling else 3,
            ),
        ),
    )
