"""Stage tune: search keys of section train over margins that are computed once.

A trial is the training of stage `train` with other settings.
"""

import dataclasses
import functools
import math
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from madpo_ray.atomic import write_json
from madpo_ray.config import Config, PolicyConfig, save_config, with_changes
from madpo_ray.data.order import Order
from madpo_ray.errors import UserError
from madpo_ray.stages import margins, train
from madpo_ray.stages.sft import stages_before_policy
from madpo_ray.stages.stage import Build, Description, Stage
from madpo_ray.waiting import waiting

if TYPE_CHECKING:
    import ray.tune

    from madpo_ray.training.job import TrainingJob

# Torch and Ray are imported inside functions: they take seconds, and neither
# `--help` nor a wrong config should wait.

METRIC = "eval_rewards/accuracies"
# Evaluations per trial if the config gives no eval_steps: ASHA can only stop a trial that reports.
EVALUATIONS = 4


def _settings(config: Config) -> dict[str, Any]:
    space = {name: bounds.model_dump() for name, bounds in config.search_space.items()}
    return {
        **train.STAGE.settings(config),
        "tune": config.tune.fingerprinted(),
        "eval_steps": config.train.eval_steps,  # decides when a trial may be stopped
        "search_space": space,
    }


def _upstream(config: Config) -> tuple[Stage, ...]:
    return (*stages_before_policy(config), margins.STAGE)


def _check(config: Config) -> None:
    """Raises UserError if a range exceeds its key's bounds, or trials cannot all be placed."""
    train.check(config)
    for end in ("min", "max"):
        values = {key: getattr(bounds, end) for key, bounds in config.search_space.items()}
        with_changes(config.train, "tune.search_space", values)

    trials = config.tune.max_concurrent_trials
    cluster = config.cluster
    if trials > 1 and cluster.address is None and not cluster.autoscaling:
        available = os.cpu_count() or 1
        if trials * cluster.num_workers * cluster.cpus_per_worker > available:
            raise UserError(
                f"tune.max_concurrent_trials: {trials} trials of {cluster.num_workers} workers do "
                f"not fit {available} CPUs together: lower it, or set cluster.address to a larger "
                "cluster"
            )


def make(build: Build) -> dict[str, Any]:
    """Searches; writes `best.yaml`, a config to train with, and `trials.json`.

    Raises:
        RuntimeError: no trial finished.
    """
    config = build.config
    found = _search(_trial_job(build), config)
    trials = [_outcome(trial) for trial in found]
    write_json(build.folder / "trials.json", trials)

    best = best_trial(trials)
    settings = with_changes(config.train, "train", best["values"])
    save_config(config.model_copy(update={"train": settings}), build.folder / "best.yaml")
    return {"best": best, "trials": len(trials), "failed": found.num_errors}


def best_trial(trials: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The trial with the highest validation accuracy, of those that ended without an error.

    Of equals the first. Raises RuntimeError if there is none.
    """
    finished = [trial for trial in trials if METRIC in trial and "error" not in trial]
    if not finished:
        raise RuntimeError("no trial was evaluated")
    return dict(max(finished, key=lambda trial: trial[METRIC]))


def describe(results: Mapping[str, Any]) -> Description:
    best = results["best"]
    values = ", ".join(f"{key} {value:.4g}" for key, value in best["values"].items())
    return [
        f"{results['trials']} trials, {results['failed']} failed; "
        f"best {METRIC} {best[METRIC]:.3f} with {values}; see best.yaml"
    ]


STAGE = Stage(
    name="tune",
    help="Search beta, c_min and c_max, or other keys of section train, over the stored margins.",
    settings=_settings,
    upstream=_upstream,
    content=train.STAGE.content,
    is_wanted=lambda config: False,  # only by its own command
    check=_check,
    check_upstream=train.check_weights,
    make=make,
    describe=describe,
    uses_dashboard=True,  # Tune frees a stopped trial's workers through its state API
)


def _trial_job(build: Build) -> "TrainingJob":
    """The training of every trial: with evaluations, and without saves between them."""
    job = dataclasses.replace(
        train.policy_job(build), stage=STAGE.name, export=False, deadline=None
    )
    eval_steps = build.config.train.eval_steps
    if eval_steps is None:
        eval_steps = max(1, _total_steps(job) // EVALUATIONS)
    # A save without an evaluation would report no objective, which is an error to Tune.
    changes = {"save_steps": None, "eval_steps": eval_steps}
    return dataclasses.replace(job, settings=with_changes(build.config.train, "train", changes))


def _count_reports(job: "TrainingJob") -> int:
    """Evaluations of a complete trial: ASHA's default of 100 would end a longer one."""
    eval_steps = job.settings.eval_steps
    assert eval_steps is not None
    return math.ceil(_total_steps(job) / eval_steps)


def _total_steps(job: "TrainingJob") -> int:
    return Order(job.order_spec(num_workers=1)).total_steps


def _run_trial(values: dict[str, Any], job: "TrainingJob", config: Config) -> None:
    """One trial, inside its own Tune actor."""
    import ray.tune
    from ray.tune.integration.ray_train import TuneReportCallback

    from madpo_ray.training.trainer import train_on_ray

    assert isinstance(job.settings, PolicyConfig)
    settings = with_changes(job.settings, "train", values)
    trial = ray.tune.get_context().get_trial_id()
    job = dataclasses.replace(job, settings=settings, trial=trial)
    train_on_ray(job, config.cluster, callbacks=[TuneReportCallback()])


def _search(job: "TrainingJob", config: Config) -> "ray.tune.ResultGrid":
    import ray.tune
    from ray.tune.schedulers import ASHAScheduler
    from ray.tune.search.optuna import OptunaSearch

    from madpo_ray.training.metrics import METRICS_FILE

    space = {}
    for key, bounds in config.search_space.items():
        draw = ray.tune.loguniform if bounds.log else ray.tune.uniform
        space[key] = draw(bounds.min, bounds.max)

    trial = functools.partial(_run_trial, job=job, config=config)
    tuner = ray.tune.Tuner(
        ray.tune.with_resources(trial, {"CPU": 0.01}),
        param_space=space,
        tune_config=ray.tune.TuneConfig(
            metric=METRIC,
            mode="max",
            num_samples=config.tune.num_samples,
            # Tune counts only a trial's driver; its workers would wait for each other for ever.
            max_concurrent_trials=config.tune.max_concurrent_trials,
            scheduler=ASHAScheduler(
                time_attr="training_iteration",
                grace_period=config.tune.grace_period,
                # One more than a complete trial reports, so that it ends by itself: a trial that is
                # stopped keeps its workers' place for a while.
                max_t=_count_reports(job) + 1,
            ),
            search_alg=OptunaSearch(seed=config.run.seed),
        ),
        run_config=ray.tune.RunConfig(name=job.name, storage_path=str(job.storage), verbose=0),
    )
    trials = f"{job.name}-*/metrics/{METRICS_FILE}"
    with waiting(
        "no trial has logged anything; their workers may be waiting for a place, loading the "
        "model, or in a long step",
        progress=lambda: sum(file.stat().st_size for file in job.storage.glob(trials)),
    ):
        found = tuner.fit()
    if found.num_errors == len(found):
        raise RuntimeError(f"no trial finished; the first failed with {found.errors[0]}")
    return found


def _outcome(trial: "ray.tune.Result") -> dict[str, Any]:
    """Values of a trial, its last numbers, and its error if it has one."""
    metrics = trial.metrics or {}
    outcome = {"values": trial.config}
    outcome |= {key: metrics[key] for key in ("step", "eval_loss", METRIC) if key in metrics}
    if trial.error:
        outcome["error"] = str(trial.error)
    return outcome
