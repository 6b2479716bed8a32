"""The search on Ray Tune: searcher, scheduler, resuming, and the outcomes of the trials."""

import contextlib
import functools
import json
import logging
import math
import os
from typing import Any

import ray.tune
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search.optuna import OptunaSearch

from madpo_ray.artifacts.building import discard
from madpo_ray.config import Config
from madpo_ray.errors import Stopped, StoppedFromOutside, UserError
from madpo_ray.search.outcomes import ACCURACY, EVALUATION, OBJECTIVES, TOTAL_STEPS, TrialOutcome
from madpo_ray.search.progress import SearchProgress
from madpo_ray.search.records import TrialRecords
from madpo_ray.search.sampler import NumberedSampler, distributions_of
from madpo_ray.search.space import Values, count_trials, own_point, random_points, with_reciprocals
from madpo_ray.search.trials import Trials, run_trial
from madpo_ray.training.metrics import METRICS_FILE
from madpo_ray.waiting import waiting

logger = logging.getLogger(__name__)

# Of a trial's last report.
REPORTED = (ACCURACY, "reward", "kl", "eval_loss", "step", TOTAL_STEPS)
# Of a trial's own process: it waits for its workers.
DRIVER_CPUS = 0.01
# Tune's handler of Ctrl-C would end the search as if it were complete.
SIGINT_HANDLER = "TUNE_DISABLE_SIGINT_HANDLER"


def search(trials: Trials, *, max_concurrent: int) -> list[TrialOutcome]:
    """Runs the trials that are left, and returns the outcomes of all, in their order.

    A search that was interrupted begins with the trials that it had, in their order. Those that
    have ended report again what they had reported, without a training, and the others resume from
    their checkpoints. With one trial at a time, this restores the state of searcher and scheduler.

    Raises:
        Stopped: a disk is full or broken, or workers were not placed.
    """
    job = trials.job
    config = trials.config
    folder = job.storage / job.name
    folder.mkdir(parents=True, exist_ok=True)
    drawn_file = folder / "drawn.json"
    drawn = json.loads(drawn_file.read_text(encoding="utf-8")) if drawn_file.exists() else []
    if drawn:
        logger.info("the search resumes with the %d trials that it had begun", len(drawn))

    progress = SearchProgress(config)
    callbacks = [TrialRecords(trials, drawn_file, drawn), progress]
    tuner = _tuner(trials, _first_points(config, drawn), callbacks, max_concurrent)
    os.environ[SIGINT_HANDLER] = "1"
    logs = f"{job.name}-*/metrics/{METRICS_FILE}"
    with waiting(
        "no trial under way has logged anything; its workers may be waiting for a place, loading "
        f"the model, or in long steps (logging_steps: {job.settings.logging_steps})",
        progress=lambda: sum(file.stat().st_size for file in job.storage.glob(logs)),
    ):
        try:
            found = tuner.fit()
        finally:
            progress.close()
    _require_complete(found, count_trials(config))

    drawn = json.loads(drawn_file.read_text(encoding="utf-8"))
    return [_outcome(trials, values, result) for values, result in zip(drawn, found, strict=True)]


def _require_complete(found: ray.tune.ResultGrid, count: int) -> None:
    """Raises Stopped for a failure from outside of a trial, RuntimeError if trials are missing."""
    for error in found.errors:
        cause = _cause(error)
        if isinstance(cause, StoppedFromOutside):
            raise Stopped(f"{cause.message} (in a trial)", cause.exit_code) from error
    ended = found.num_terminated + found.num_errors
    if ended < count:
        raise RuntimeError(f"the search ended after {ended} of {count} trials")


def _first_points(config: Config, drawn: list[Values]) -> list[Values]:
    """What the trials begin with: those of an interrupted search, or the config's own values."""
    if config.tune.searcher == "random":
        return random_points(config)
    if drawn:
        return drawn
    own = own_point(config)
    if own is None:
        logger.info(
            "no trial has the config's own values: the search space does not hold them, or they do "
            "not follow from each other as it says"
        )
        return []
    return [own]


def _tuner(
    trials: Trials, points: list[Values], callbacks: list[ray.tune.Callback], max_concurrent: int
) -> ray.tune.Tuner:
    config = trials.config
    metrics = OBJECTIVES[config.tune.objective]
    search_alg = OptunaSearch(
        distributions_of(config.search_space),
        metric=[name for name, _ in metrics] if len(metrics) > 1 else metrics[0][0],
        mode=[mode for _, mode in metrics] if len(metrics) > 1 else metrics[0][1],
        points_to_evaluate=points,
        sampler=NumberedSampler(config.run.seed, count_trials(config)),
    )

    # What Tune keeps of its own is of no use to the next start.
    job = trials.job
    storage = job.storage / job.name
    discard(storage / "tune")
    trial = functools.partial(run_trial, trials=trials, space=config.search_space)
    return ray.tune.Tuner(
        ray.tune.with_resources(trial, {"CPU": DRIVER_CPUS}),
        tune_config=ray.tune.TuneConfig(
            num_samples=count_trials(config),
            # Tune counts only a trial's driver; its workers would wait for each other for ever.
            max_concurrent_trials=max_concurrent,
            scheduler=_scheduler(config),
            search_alg=search_alg,
        ),
        run_config=ray.tune.RunConfig(
            name="tune", storage_path=str(storage), verbose=0, callbacks=callbacks
        ),
    )


def _scheduler(config: Config) -> ASHAScheduler | None:
    settings = config.tune
    if settings.scheduler == "none":
        return None
    ((metric, mode),) = OBJECTIVES[settings.objective]
    return ASHAScheduler(
        time_attr=EVALUATION,
        metric=metric,
        mode=mode,
        grace_period=settings.grace_period,
        reduction_factor=settings.reduction_factor,
        # Before the last evaluation, and seldom there: a trial that is stopped keeps its workers'
        # place for a while.
        max_t=max(settings.evaluations - 1, settings.grace_period),
        stop_last_trials=False,
    )


def _outcome(trials: Trials, drawn: Values, result: ray.tune.Result) -> TrialOutcome:
    """What is on the disk of a trial, and its error."""
    values = with_reciprocals(trials.config.search_space, drawn)
    seconds = (result.metrics or {}).get("time_total_s")
    last: dict[str, Any] = {}
    with contextlib.suppress(UserError):  # no training has such settings: that is its error
        trial = trials.of(values)
        last = next(reversed(trial.reports()), {})
        seconds = trial.end.seconds if trial.end else seconds
    metrics = {name: last[name] for name in REPORTED if _is_finite(last.get(name))}
    error = None if result.error is None else _reason(result.error)
    return TrialOutcome(values, last.get(EVALUATION, 0), metrics, seconds, error)


def _cause(error: Exception | str) -> Exception | str:
    """What was raised in a trial, without Ray's wrapping."""
    return getattr(error, "cause", None) or error


def _reason(error: Exception | str) -> str:
    cause = _cause(error)
    if isinstance(cause, str):
        return cause
    return f"{type(cause).__name__}: {getattr(cause, 'message', None) or cause}"


def _is_finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)
