"""Stage 6: search keys of section `train` over margins that are computed once. A trial is stage 4's training, nothing
else."""

import dataclasses
import functools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from madpo_ray import margins, train
from madpo_ray.artifacts import Inputs, building, require, write_json
from madpo_ray.cluster import connected
from madpo_ray.config import Config, UserError, settings_of
from madpo_ray.config_file import parse_config
from madpo_ray.launch import train_on_ray
from madpo_ray.pipeline import save_config
from madpo_ray.plan import Plan
from madpo_ray.worker import TrainingJob

METRIC = "eval_rewards/accuracies"
# Evaluations in a trial where the config names no eval_steps: ASHA can only stop a trial that reports.
EVALUATIONS = 4


def inputs(config: Config) -> Inputs:
    return Inputs("tune", {"train": train.inputs(config).fingerprint, "tune": settings_of(config.tune)})


def folder(config: Config) -> Path:
    return config.run.folder / "tune"


def with_values(config: Config, values: Mapping[str, Any]) -> Config:
    """The config with keys of section `train` replaced, checked like any other. Raises UserError."""
    raw = config.model_dump()
    raw["train"] |= values
    return parse_config(raw)


def _trial(values: dict[str, Any], job: TrainingJob) -> None:
    """One trial, inside its own Tune actor: the job with other values, under a name of its own."""
    import ray.tune
    from ray.tune.integration.ray_train import TuneReportCallback

    name = f"{job.experiment}-{ray.tune.get_context().get_trial_id()}"
    config = with_values(job.config, values)
    train_on_ray(dataclasses.replace(job, config=config, experiment=name), callbacks=[TuneReportCallback()])


def run(config: Config) -> Path:
    """Searches, and writes `best.yaml` (a config to train with) and `trials.json`.

    Raises:
        UserError: the margins are missing or made from other inputs.
        RuntimeError: no trial finished.
    """
    require(margins.folder(config), margins.inputs(config))
    train.check_weights(config)
    _check_search(config)
    with building(folder(config), inputs(config)) as (partial, results):
        name = inputs(config).experiment
        job = train.job(_reporting(config), output=partial, experiment=name, export=False)
        with connected(config.cluster, dashboard=True):
            found = _search(job)
        trials = [_outcome(trial) for trial in found]
        write_json(partial / "trials.json", trials)
        best = max(
            (trial for trial in trials if METRIC in trial and "error" not in trial), key=lambda trial: trial[METRIC]
        )
        save_config(with_values(config, best["values"]), partial / "best.yaml")
        results.update(best=best, trials=len(trials), failed=found.num_errors)
    return folder(config)


def _check_search(config: Config) -> None:
    """Raises UserError where a range leaves its key's bounds, or trials at a time cannot all be placed."""
    for end in ("min", "max"):
        with_values(config, {key: getattr(bounds, end) for key, bounds in config.tune.search_space.items()})
    trials, cluster = config.tune.max_concurrent_trials, config.cluster
    if trials > 1 and cluster.address is None and not cluster.autoscaling:
        available = os.cpu_count() or 1
        if trials * cluster.num_workers * cluster.cpus_per_worker > available:
            raise UserError(
                f"tune.max_concurrent_trials: {trials} trials of {cluster.num_workers} workers do not fit "
                f"{available} CPUs together: lower it, or name a larger cluster in cluster.address"
            )


def _outcome(trial: Any) -> dict[str, Any]:
    """Values of a trial, its last numbers, and its error if it has one."""
    numbers = {key: trial.metrics[key] for key in ("step", "eval_loss", METRIC) if key in (trial.metrics or {})}
    return {"values": trial.config, **numbers, **({"error": str(trial.error)} if trial.error else {})}


def describe(results: Mapping[str, Any]) -> str:
    """The search's outcome in a line."""
    best = results["best"]
    values = ", ".join(f"{key} {value:.4g}" for key, value in best["values"].items())
    return (
        f"{results['trials']} trials, {results['failed']} failed; "
        f"best {METRIC} {best[METRIC]:.3f} with {values}; see best.yaml"
    )


def _reporting(config: Config) -> Config:
    """The config of a trial: evaluations on the way, and an end of its own."""
    # A save without an evaluation would report no objective, which Tune takes for an error.
    config = with_values(config, {"save_steps": None})
    config = config.model_copy(update={"run": config.run.model_copy(update={"max_wall_time": None})})
    if config.train.eval_steps is not None:
        return config
    probe = train.job(config, output=folder(config), experiment="plan", export=False)
    total = Plan(probe.plan(config.cluster.num_workers)).total_steps
    return with_values(config, {"eval_steps": max(1, total // EVALUATIONS)})


def _search(job: TrainingJob) -> Any:
    import ray.tune
    from ray.tune.schedulers import ASHAScheduler
    from ray.tune.search.optuna import OptunaSearch

    config = job.config
    space = {
        key: ray.tune.loguniform(bounds.min, bounds.max) if bounds.log else ray.tune.uniform(bounds.min, bounds.max)
        for key, bounds in config.tune.search_space.items()
    }
    tuner = ray.tune.Tuner(
        ray.tune.with_resources(functools.partial(_trial, job=job), {"CPU": 0.01}),
        param_space=space,
        tune_config=ray.tune.TuneConfig(
            metric=METRIC,
            mode="max",
            num_samples=config.tune.num_samples,
            # Tune counts only a trial's driver; its workers would wait for each other's places for ever.
            max_concurrent_trials=config.tune.max_concurrent_trials,
            scheduler=ASHAScheduler(time_attr="training_iteration", grace_period=config.tune.grace_period),
            search_alg=OptunaSearch(seed=config.run.seed),
        ),
        run_config=ray.tune.RunConfig(name=job.experiment, storage_path=str(job.checkpoints.parent), verbose=0),
    )
    found = tuner.fit()
    if found.num_errors == len(found):
        raise RuntimeError(f"no trial finished; the first failed with {found.errors[0]}")
    return found
