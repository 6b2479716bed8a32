"""A stage: one command, what it is made from, and how."""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from madpo_ray.artifacts.building import building, discard, has_leftovers, recover
from madpo_ray.artifacts.lock import RunLock, locked
from madpo_ray.artifacts.manifest import (
    Inputs,
    compare_inputs,
    is_finished,
    model_folder,
    read_manifest,
    require,
)
from madpo_ray.artifacts.tables import rows_folder
from madpo_ray.cluster.connection import connected
from madpo_ray.config import ClusterConfig, Config, TrainingConfig
from madpo_ray.errors import UserError
from madpo_ray.passes import BatchNotes

if TYPE_CHECKING:
    from rich.table import Table

    from madpo_ray.models.loading import TaskType
    from madpo_ray.training.job import Task, TrainingJob

# Torch and Ray Train take seconds to import, and neither `--help` nor a wrong config should wait:
# they are imported inside functions.

# Folder below `ray/<stage>-<hash>/` for what a stage has done before it is finished.
KEPT = "kept"

# What a stage prints at its end: lines of text, and tables.
Description = Sequence["str | Table"]


@dataclass(frozen=True)
class Build:
    """What a stage gets to work with while it runs."""

    config: Config
    folder: Path  # a fresh one, for the result
    fingerprint: str  # of the stage's inputs
    deadline: float | None = None  # time.time() at which a training saves and exits

    @property
    def rows(self) -> Path:
        """Where the stage puts its rows."""
        return rows_folder(self.folder)

    @property
    def notes(self) -> BatchNotes:
        """Where actors note what they work on."""
        return BatchNotes(self.config.run.ray_folder / f"in-progress-{self.fingerprint[:16]}")


@dataclass(frozen=True)
class Stage:
    """One command: what it is made from, and how.

    Attributes:
        name: of the command and of the folder.
        help: one line for `--help`.
        settings: what of the config decides its numbers.
        make: builds the result into a folder; what it returns goes to the manifest.
        describe: what `make` returned, for the terminal.
        upstream: the stages whose results decide its own.
        reads: those of them, or before them, that have to be finished; None: `upstream`.
        content: hashes of what the config points to.
        names: where the config finds that content; recorded, but not part of the fingerprint.
        is_wanted: whether `madpo-ray run` includes it.
        check: raises UserError for what can be wrong before any stage has run.
        check_upstream: raises UserError for what can be wrong with the results that it reads.
        streams: whether pairs are scored while it trains.
        uses_ray: whether it needs a cluster.
        uses_dashboard: whether a local Ray needs its dashboard.
    """

    name: str
    help: str
    settings: Callable[[Config], dict[str, Any]]
    make: Callable[[Build], dict[str, Any]]
    describe: Callable[[Mapping[str, Any]], Description]
    upstream: Callable[[Config], tuple["Stage", ...]] = lambda config: ()
    reads: Callable[[Config], tuple["Stage", ...]] | None = None
    content: Callable[[Config], dict[str, Any]] = lambda config: {}
    names: Callable[[Config], dict[str, Any]] = lambda config: {}
    is_wanted: Callable[[Config], bool] = lambda config: True
    check: Callable[[Config], None] = lambda config: None
    check_upstream: Callable[[Config], None] = lambda config: None
    streams: Callable[[Config], bool] = lambda config: False
    uses_ray: bool = True
    uses_dashboard: bool = False

    def inputs(self, config: Config) -> Inputs:
        """What the result is made from."""
        return Inputs(
            self.name,
            settings=self.settings(config),
            upstream={
                stage.name: stage.inputs(config).fingerprint for stage in self.upstream(config)
            },
            content=self.content(config),
            names=self.names(config),
        )

    def needed(self, config: Config) -> tuple["Stage", ...]:
        """The stages that have to be finished."""
        return self.upstream(config) if self.reads is None else self.reads(config)

    def folder(self, config: Config) -> Path:
        """Where the result is."""
        return config.run.folder / self.name

    def rows(self, config: Config) -> Path:
        """Where the result's rows are."""
        return rows_folder(self.folder(config))

    def model(self, config: Config) -> Path:
        """Where the model is that a training stage wrote."""
        return model_folder(self.folder(config))

    def exists(self, config: Config) -> bool:
        """Whether there is a result, of this config or another."""
        return read_manifest(self.folder(config)) is not None

    def is_finished(self, config: Config) -> bool:
        """Whether the result is there and was made from this config."""
        # First whether there is one: for its inputs files are hashed, and models are fetched.
        return self.exists(config) and is_finished(self.folder(config), self.inputs(config))

    def require(self, config: Config) -> dict[str, Any]:
        """The results in the manifest, for a stage that builds on them.

        Raises:
            UserError: the result is missing or was made from other inputs.
        """
        results: dict[str, Any] = require(self.folder(config), self.inputs(config))["results"]
        return results

    def require_upstream(self, config: Config) -> None:
        """Raises UserError if a result that the stage reads is missing, of other inputs, or bad."""
        for stage in self.needed(config):
            stage.require(config)
        self.check_upstream(config)

    def has_leftovers(self, config: Config) -> bool:
        """Whether there is something that `recover` would finish or delete."""
        return has_leftovers(self.folder(config)) or bool(self._unneeded(config))

    def recover(self, config: Config) -> None:
        """Finishes what a kill interrupted after the result was made. Needs the run's lock."""
        recover(self.folder(config), self.inputs(config))
        if self.is_finished(config):
            self._delete_unneeded(config)

    def run(self, config: Config, *, deadline: float | None = None) -> Mapping[str, Any]:
        """Makes the result and moves it into place. Returns what `make` returned.

        Raises:
            UserError: an upstream result is missing or was made from other inputs, or what the
                stage reads changed while it ran, or another command writes the run.
        """
        with locked(config.run.folder, self.name) as lock:
            self.require_upstream(config)
            inputs = self.inputs(config)

            def confirm() -> None:
                self._confirm(config, inputs, lock)

            with (
                building(self.folder(config), inputs, confirm=confirm) as (partial, results),
                self._connected(config),
            ):
                build = Build(config, partial, inputs.fingerprint, deadline)
                results.update(self.make(build))
            self._delete_unneeded(config)
        return results

    def _connected(self, config: Config) -> contextlib.AbstractContextManager[None]:
        if not self.uses_ray:
            return contextlib.nullcontext()
        return connected(
            config.cluster,
            actors=config.actors,
            streams=self.streams(config),
            dashboard=self.uses_dashboard,
        )

    def _delete_unneeded(self, config: Config) -> None:
        for path in self._unneeded(config):
            discard(path)

    def _unneeded(self, config: Config) -> list[Path]:
        """What the stage kept while it ran, also with other settings, and trials of it."""
        patterns = [f"{self.name}-tokens-*/", f"{self.name}-*/{KEPT}/"]
        if not config.run.keep_checkpoints:
            kinds = ("checkpoint_*", ".checkpoint_*.trash-*", "result")
            patterns += [f"{self.name}-*/{kind}/" for kind in kinds]
        return [path for pattern in patterns for path in config.run.ray_folder.glob(pattern)]

    def _confirm(self, config: Config, inputs: Inputs, lock: RunLock) -> None:
        """Raises UserError if the stage no longer has what it was made from."""
        lock.require_held()
        self.require_upstream(config)
        if changed := compare_inputs(inputs.parts, self.inputs(config).parts):
            raise UserError(
                f"what {self.name} reads changed while it ran, and its result is not kept:\n  "
                + "\n  ".join(map(str, changed))
                + "\nrun the same command again"
            )


def run_training(job: "TrainingJob", cluster: ClusterConfig) -> dict[str, Any]:
    """Runs a training on Ray; returns its last, or best, evaluation.

    Writes `model/`, `metrics.jsonl` and `tensorboard/` into the job's output folder.
    """
    from madpo_ray.training.metrics import METRICS_FILE, read_metrics
    from madpo_ray.training.trainer import train_on_ray

    outcome = train_on_ray(job, cluster)
    return outcome.evaluation(read_metrics(job.output / METRICS_FILE))


def training_job(
    build: Build,
    stage: str,
    task: "Task",
    settings: TrainingConfig,
    *,
    initial: Path,
    rows: Path,
) -> "TrainingJob":
    """The training of a stage, with only the parts of the config that a worker needs.

    Args:
        initial: folder of the model that the training starts from.
        rows: folder of Parquet files with tokens and the task's columns.
    """
    from madpo_ray.training.job import TrainingJob

    config = build.config
    return TrainingJob(
        stage=stage,
        fingerprint=build.fingerprint,
        task=task,
        settings=settings,
        model=config.model,
        seed=config.run.seed,
        num_threads=config.cluster.num_threads,
        base_folder=initial,
        rows=rows,
        output=build.folder,
        storage=config.run.ray_folder,
        deadline=build.deadline,
    )


def check_training(config: Config, settings: TrainingConfig, *, task_type: "TaskType") -> None:
    """Raises UserError if the model cannot be trained as the settings say.

    Looks at a model that is a local folder; any other is checked when the stage runs.
    """
    folder = Path(config.model.model_name_or_path)
    if not folder.is_dir():
        return
    from madpo_ray.models.checks import check_weights
    from madpo_ray.models.trainable import check_trainable

    check_trainable(folder, config.model, settings, task_type=task_type)
    check_weights(folder, config.model, task_type=task_type)
