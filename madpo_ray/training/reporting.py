"""Publishes metrics and checkpoints, and collects requests to save or stop."""

import time

import torch

from madpo_ray.training.checkpoints import (
    checkpoint_folder,
    newest_checkpoint,
    prune_checkpoints,
    save_checkpoint,
)
from madpo_ray.training.collectives import max_over_ranks
from madpo_ray.training.engine import DeepSpeedEngine
from madpo_ray.training.job import TrainingJob
from madpo_ray.training.metrics import MetricsLog
from madpo_ray.training.protocols import Notice, Objective, Site
from madpo_ray.training.schedule import Progress

# Between two checks whether a node is leaving: all ranks wait for each other there.
PREEMPTION_POLL_S = 5.0


class RunReporter:
    """Writes metrics on rank 0, and passes them and checkpoints to the site."""

    def __init__(
        self,
        job: TrainingJob,
        site: Site,
        engine: DeepSpeedEngine,
        objective: Objective,
        log: MetricsLog | None,
    ) -> None:
        self._job = job
        self._site = site
        self._engine = engine
        self._objective = objective
        self._log = log  # on rank 0

    def log(self, progress: Progress, metrics: dict[str, float]) -> None:
        if self._log is not None:
            self._log.write(progress.step, metrics)

    def publish(self, progress: Progress, metrics: dict[str, float], *, save: bool) -> None:
        if self._log is not None and metrics:
            self._log.write(progress.step, metrics)

        numbers = {"step": progress.step, **metrics}
        if not save:
            self._site.report(numbers)
            return

        # Straight to the run's storage: every rank writes its part.
        folder = checkpoint_folder(self._job.checkpoints, progress.step)
        state = {
            "progress": progress.state_dict(),
            "objective": self._objective.state_dict(),
        }
        save_checkpoint(self._engine, folder, state)
        self._site.report(numbers)
        if self._site.rank == 0:  # after the barrier: every rank has written its part
            limit = self._job.settings.save_total_limit
            prune_checkpoints(self._job.checkpoints, progress, limit=limit)

    def last_checkpoint(self) -> str:
        newest = newest_checkpoint(self._job.checkpoints)
        if newest is None:
            return "No checkpoint was saved yet"
        return f"The last good checkpoint is that of step {newest.step}, {newest.folder}"


class Noticeboard:
    """The most severe notice that any rank knows of, the same on all of them. A collective."""

    def __init__(self, job: TrainingJob, site: Site, device: torch.device) -> None:
        self._job = job
        self._site = site
        self._device = device
        self._next_poll = time.monotonic()
        self._saved_for_preemption = False

    def __call__(self) -> Notice:
        own = Notice.NONE
        # One clock decides: those of other nodes may differ from the driver's.
        deadline = self._job.deadline if self._site.rank == 0 else None
        if deadline is not None and time.time() >= deadline:
            own = Notice.OUT_OF_TIME
        if self._job.is_asked_to_stop():
            own = Notice.TERMINATED

        # A trial of Tune saves nothing on a notice: all its reports must hold the objective.
        should_poll = (
            self._job.export and self._site.rank == 0 and time.monotonic() >= self._next_poll
        )
        notice, anyone_polls = max_over_ranks([own, should_poll], self._device)
        if anyone_polls:
            self._next_poll = time.monotonic() + PREEMPTION_POLL_S
            is_leaving = self._site.node_is_leaving()
            if is_leaving and not self._saved_for_preemption:
                notice = max(notice, Notice.SAVE)
            self._saved_for_preemption = is_leaving  # the next node is saved for again
        return Notice(int(notice))
