"""A trial: the training of stage train with other settings, inside an actor of Ray Tune.

What a trial has reported is in its job's metrics. The job is named by the trial's values, so that a
resumed search, and another trial with the same values, finds it.
"""

import contextlib
import fcntl
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import ray.tune
from ray.tune.integration.ray_train import TuneReportCallback

from madpo_ray.artifacts.building import discard
from madpo_ray.artifacts.lock import NO_LOCKS
from madpo_ray.atomic import write_json
from madpo_ray.config import Config, Domain, with_changes
from madpo_ray.data.order import Order
from madpo_ray.errors import ExitCode, StoppedForGood
from madpo_ray.search.outcomes import ACCURACY, EVALUATION, TOTAL_STEPS
from madpo_ray.search.space import settings_of, with_reciprocals
from madpo_ray.training.checkpoints import checkpoint_folders, newest_step
from madpo_ray.training.job import Task, TrainingJob
from madpo_ray.training.metrics import METRICS_FILE, read_metrics
from madpo_ray.training.trainer import train_on_ray

# What else is measured of a trained policy, in the actor of its trial.
Measure = Callable[[Config, TrainingJob], dict[str, float]]


@dataclass(frozen=True)
class Trials:
    """All trials of a search: what they share."""

    job: TrainingJob  # of stage train
    config: Config
    task: Callable[[Config], Task]  # what is trained with a trial's config
    measure: Measure | None = None  # None: only evaluations count

    def config_of(self, values: Mapping[str, Any]) -> Config:
        """The config with a trial's settings, and the seed of the run."""
        settings, _ = settings_of(values)
        train = with_changes(self.config.train, "train", settings)
        return self.config.model_copy(update={"train": train})

    def of(self, values: Mapping[str, Any]) -> "Trial":
        """The trial with these values, begun or not."""
        config = self.config_of(values)
        _, seed = settings_of(values)
        named = json.dumps(dict(values), sort_keys=True)
        job = replace(
            self.job,
            task=self.task(config),
            settings=config.train,
            seed=self.job.seed if seed is None else seed,
            trial=hashlib.sha256(named.encode()).hexdigest()[:16],
            export=self.measure is not None,
            deadline=None,
        )
        # Each evaluation saves: a trial resumes there. It ends with its last step.
        total_steps = Order(job.order_spec(num_workers=1)).total_steps
        interval = max(1, math.ceil(total_steps / config.tune.evaluations))
        changes = {
            "eval_steps": interval,
            "save_steps": interval,
            "save_total_limit": 1,
            "early_stopping_patience": None,
            "metric_for_best_model": None,  # its weights are those of its last evaluation
        }
        settings = with_changes(config.train, "train", changes)
        job = replace(job, output=job.checkpoints / "result", settings=settings)
        return Trial(config, job, total_steps, self.measure)


class EndRecord(NamedTuple):
    """How a trial ended for good."""

    evaluation: int  # the last that was reported; a stopped training may have gone further
    seconds: float | None  # of its last training; None if that is not known
    failure: str | None  # why it could not be trained to its end
    skip_nonfinite: int  # at which it failed


@dataclass(frozen=True)
class Trial:
    """One trial and its files."""

    config: Config
    job: TrainingJob
    total_steps: int
    measure: Measure | None

    @property
    def _ended_file(self) -> Path:
        """Exists once a trial has ended; it will not train again."""
        return self.job.checkpoints / "ended.json"

    @property
    def _measured_file(self) -> Path:
        return self.job.checkpoints / "measured.json"

    def record_end(
        self, evaluation: int, seconds: float | None, failure: str | None = None
    ) -> None:
        """Writes that the trial has ended for good, unless that is written already.

        The arguments are those of `EndRecord`.
        """
        self.job.checkpoints.mkdir(parents=True, exist_ok=True)
        if not self._ended_file.exists():
            record = EndRecord(evaluation, seconds, failure, self.job.settings.skip_nonfinite)
            write_json(self._ended_file, record._asdict())

    def discard_checkpoints(self) -> None:
        """Deletes what only resuming would need."""
        for unneeded in (*checkpoint_folders(self.job.checkpoints), self.job.output):
            with contextlib.suppress(FileNotFoundError):  # a training that ends deletes some, too
                discard(unneeded)

    @property
    def end(self) -> EndRecord | None:
        """How it ended; None if it did not yet."""
        if not self._ended_file.exists():
            return None
        return EndRecord(**json.loads(self._ended_file.read_text(encoding="utf-8")))

    def reports(self) -> list[dict[str, Any]]:
        """The reports of the trial so far.

        Each evaluation, or the last one with what was measured after it.
        """
        lines = read_metrics(self.job.metrics / METRICS_FILE)
        evaluations = [self.numbered(line) for line in lines if ACCURACY in line]
        if self.measure is not None:
            if not (evaluations and self._measured_file.exists()):
                return []
            measured = json.loads(self._measured_file.read_text(encoding="utf-8"))
            return [evaluations[-1] | measured]
        if (end := self.end) is not None:
            return [one for one in evaluations if one[EVALUATION] <= end.evaluation]
        step = newest_step(self.job.checkpoints)
        return [one for one in evaluations if one["step"] <= step]

    def numbered(self, numbers: Mapping[str, Any]) -> dict[str, Any]:
        """Numbers with how many evaluations there were."""
        interval = self.job.settings.eval_steps
        assert interval is not None
        evaluation = math.ceil(numbers["step"] / interval)
        return {**numbers, EVALUATION: evaluation, TOTAL_STEPS: self.total_steps}

    def run(self) -> None:
        """Trains from where an earlier run ended; reports every evaluation to Ray Tune.

        Raises:
            StoppedForGood: a loss or gradient is not finite, in this or an earlier start of the
                search; it is tried again with a larger `skip_nonfinite`.
        """
        began = time.monotonic()
        end = self.end
        if end and end.failure and end.skip_nonfinite < self.job.settings.skip_nonfinite:
            self._ended_file.unlink()
            end = None
        reported = self.reports()
        for report in reported:
            ray.tune.report(report)
        if end and end.failure:
            raise StoppedForGood(end.failure, ExitCode.FAILED)
        if end:
            return
        if self.measure is not None and reported:  # it was killed just before its end
            self.record_end(reported[-1][EVALUATION], None)
            return

        callbacks = [_EvaluationCallback(self)] if self.measure is None else []
        try:
            train_on_ray(self.job, self.config.cluster, callbacks=callbacks)
        except StoppedForGood as stopped:
            reports = self.reports()
            last_evaluation = reports[-1][EVALUATION] if reports else 0
            self.record_end(last_evaluation, time.monotonic() - began, stopped.message)
            raise
        if self.measure is not None:
            write_json(self._measured_file, self.measure(self.config, self.job))

        # The last evaluation, again: a restart of the workers may have lost it. A trial that was
        # stopped meanwhile does not come further than this.
        last = self.reports()[-1]
        ray.tune.report(last)
        self.record_end(last[EVALUATION], time.monotonic() - began)


def run_trial(drawn: dict[str, Any], trials: Trials, space: dict[str, Domain]) -> None:
    """The trainable of Ray Tune."""
    trial = trials.of(with_reciprocals(space, drawn))
    trial.job.checkpoints.mkdir(parents=True, exist_ok=True)
    with _alone(trial.job.checkpoints / "trial.lock"):
        trial.run()


@contextlib.contextmanager
def _alone(file: Path) -> Iterator[None]:
    """Waits for another trial with the same values. The lock ends with its process."""
    with file.open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
        yield


class _EvaluationCallback(TuneReportCallback):  # type: ignore[misc]
    """Reports evaluations to Tune, and ignores saves without one."""

    def __init__(self, trial: Trial) -> None:
        super().__init__()
        self._trial = trial

    def after_report(
        self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any
    ) -> None:
        if ACCURACY in metrics[0]:
            super().after_report(run_context, [self._trial.numbered(metrics[0])], None)
