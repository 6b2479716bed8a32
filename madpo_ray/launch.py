"""A training on Ray: TorchTrainer around `train_rank`, fed by the plan's dataset, resumed by name."""

import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from madpo_ray.cluster import ordered_execution, worker_resources
from madpo_ray.config import UserError
from madpo_ray.engine import checkpoint_step
from madpo_ray.models import tell_layout
from madpo_ray.plan import Plan, micro_batch_dataset
from madpo_ray.progress import training_progress
from madpo_ray.worker import TrainingJob, train_rank

logger = logging.getLogger(__name__)


def newest_checkpoint(experiment: Path) -> tuple[int, Path] | None:
    """Step and folder of a run's newest whole checkpoint, or None.

    A newer one that is torn or was changed since it was written is passed over with a warning.
    """
    for folder in sorted(experiment.glob("checkpoint_*"), reverse=True):
        step = checkpoint_step(folder)
        if step is not None:
            return step, folder
        logger.warning("checkpoint %s is torn or was changed; taking the one before it", folder)
    return None


class RaySite:
    """A rank of a TorchTrainer."""

    def __init__(self, job: TrainingJob) -> None:
        import ray.train

        context = ray.train.get_context()
        self.rank, self.world_size = context.get_world_rank(), context.get_world_size()
        self._newest = newest_checkpoint(job.checkpoints)

    def rows(self, start_step: int) -> Iterator[pa.Table]:
        import ray.train

        shard = ray.train.get_dataset_shard("train")
        assert shard is not None
        yield from shard.iter_batches(batch_size=1, batch_format="pyarrow", prefetch_batches=4)

    def checkpoint(self) -> Path | None:
        return self._newest[1] if self._newest else None

    def report(self, numbers: dict[str, float], checkpoint: Path | None) -> None:
        import ray.train

        part = ray.train.Checkpoint.from_directory(checkpoint) if checkpoint else None
        ray.train.report(numbers, checkpoint=part)


def _train_on_rank(spec: dict[str, TrainingJob]) -> None:
    train_rank(spec["job"], RaySite(spec["job"]))


def train_on_ray(job: TrainingJob, callbacks: list[Any] | None = None) -> None:
    """Runs a job to its end; one of the same name goes on from its newest checkpoint.

    Raises:
        ray.train.TrainingFailedError: the workers failed more often than cluster.max_failures allows.
    """
    import ray.train
    from ray.train.torch import TorchTrainer

    cluster = job.config.cluster
    tell_layout(job.base, job.config.model)
    _refuse_other_world_size(job)
    spec = job.plan(cluster.num_workers)

    def dataset() -> Any:  # evaluated anew whenever the workers start, so it goes on where they do
        newest = newest_checkpoint(job.checkpoints)
        return micro_batch_dataset(spec, newest[0] if newest else 0)

    trainer = TorchTrainer(
        _train_on_rank,
        train_loop_config={"job": job},
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
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=job.settings.save_total_limit),
            failure_config=ray.train.FailureConfig(
                max_failures=cluster.max_failures, controller_failure_limit=-1 if cluster.autoscaling else 3
            ),
        ),
    )
    with training_progress(job.experiment.split("-")[0], job.metrics / "metrics.jsonl", Plan(spec).total_steps):
        trainer.fit()
    if job.export:
        shutil.copytree(job.metrics, job.output, dirs_exist_ok=True)


def _refuse_other_world_size(job: TrainingJob) -> None:
    """A ZeRO checkpoint belongs to its number of ranks. Raises UserError where the config's differs."""
    newest, workers = newest_checkpoint(job.checkpoints), job.config.cluster.num_workers
    if newest is None or len(list(newest[1].glob("rank-*.json"))) == workers:
        return
    raise UserError(
        f"{newest[1]} was saved by another number of workers than cluster.num_workers: {workers}. Set it back "
        f"to go on, or delete {job.checkpoints} to start anew"
    )
