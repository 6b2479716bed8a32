"""Stage tune: search keys of section train over margins that are computed once.

A trial is the training of stage `train` with other settings.
"""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from madpo_ray import columns
from madpo_ray.atomic import write_csv, write_json
from madpo_ray.config import Config, load_config, parse_config, save_config, with_changes
from madpo_ray.config.search import Choice, Grid
from madpo_ray.errors import UserError
from madpo_ray.passes import BatchNotes
from madpo_ray.stages import margins, pairs, reward, train
from madpo_ray.stages.policy_samples import check_prompts, measure_rewards, require_judge
from madpo_ray.stages.sft import stages_before_policy
from madpo_ray.stages.stage import Build, Description, Stage

if TYPE_CHECKING:
    from madpo_ray.search.outcomes import TrialOutcome
    from madpo_ray.training.job import TrainingJob

# Torch and Ray are imported inside functions: they take seconds, and neither
# `--help` nor a wrong config should wait.

BEST = "best.yaml"
LOSS_TYPE = "train.loss_type"
WEIGHT_COLUMN = "train.weight_column"


def _settings(config: Config) -> dict[str, Any]:
    found = {
        **train.STAGE.settings(config),
        "tune": config.tune.fingerprinted(),
        "search_space": {
            name: one.model_dump(mode="json") for name, one in config.search_space.items()
        },
    }
    if config.tune.objective != "accuracy":
        names = {"num_samples", "max_new_tokens", "generation_batch_size"}
        found["evaluate"] = config.evaluate.model_dump(mode="json", include=names)
        found["judge"] = require_judge(config).settings()
    loss_types = config.search_space.get(LOSS_TYPE)
    if isinstance(loss_types, Choice | Grid) and "beta_dpo" in loss_types.values:
        found["num_workers"] = config.cluster.num_workers  # its statistics are of micro-batches
    return found


def _upstream(config: Config) -> tuple[Stage, ...]:
    return (*stages_before_policy(config), margins.STAGE)


def _content(config: Config) -> dict[str, Any]:
    found = dict(train.STAGE.content(config))
    if config.tune.objective != "accuracy":
        found["judge"] = require_judge(config).content()
    return found


def _names(config: Config) -> dict[str, Any]:
    """Where the config finds the judge."""
    return config.evaluate.model_dump(mode="json", include={"judge", "judge_revision"})


def _check(config: Config) -> None:
    """Raises UserError if a range exceeds its key's bounds, or trials cannot all be placed."""
    train.check(config)
    _check_space(config)
    if config.tune.objective != "accuracy":
        judge = require_judge(config)
        if pairs.STAGE.is_finished(config):
            check_prompts(config, judge, columns.VALIDATION)

    trials = config.tune.max_concurrent_trials or 1
    cluster = config.cluster
    is_local = cluster.address is None and "RAY_ADDRESS" not in os.environ
    if trials > 1 and is_local and not cluster.autoscaling:
        available = os.cpu_count() or 1
        if trials * cluster.num_workers * cluster.cpus_per_worker > available:
            raise UserError(
                f"tune.max_concurrent_trials: {trials} trials of {cluster.num_workers} workers do "
                f"not fit {available} CPUs together: lower it, or set cluster.address to a larger "
                "cluster"
            )


def _check_space(config: Config) -> None:
    """Raises UserError for a value that its key cannot have, or that does not suit the rest."""
    from madpo_ray.search.space import corners, settings_of

    for values in corners(config.search_space):
        settings, seed = settings_of(values)
        if seed is not None:
            with_changes(config.run, "tune.search_space.run", {"seed": seed})
        changed = with_changes(config.train, "tune.search_space.train", settings)
        try:
            parse_config({**config.model_dump(), "train": changed.model_dump()})
        except UserError as error:
            shown = ", ".join(f"{key}: {value}" for key, value in values.items())
            raise UserError(f"tune.search_space, at {shown}: {error}") from None
        needs_rewards = reward.uses_rewards(config.model_copy(update={"train": changed}))
        if needs_rewards and not reward.uses_rewards(config):
            raise UserError(
                f"tune.search_space: {LOSS_TYPE} {changed.loss_type} needs margins, and "
                f"{LOSS_TYPE} {config.train.loss_type} does not: set margins.with_rewards: true"
            )


def _check_pair_weights(config: Config) -> None:
    """Raises UserError if a pair's own weight is wrong, in any column that trials may use."""
    domain = config.search_space.get(WEIGHT_COLUMN)
    names = [config.train.weight_column]
    names += domain.values if isinstance(domain, Choice | Grid) else []
    for name in dict.fromkeys(names):
        changed = with_changes(config.train, "tune.search_space", {"weight_column": name})
        train.check_pair_weights(config.model_copy(update={"train": changed}))


def make(build: Build) -> dict[str, Any]:
    """Searches; writes `trials.csv`, `trials.json`, `best.yaml` (a config) and pictures.

    Raises:
        Stopped: no trial was evaluated.
        UserError: so many trials never fit the cluster at the same time.
    """
    from madpo_ray.search.outcomes import OBJECTIVES, best_settings, table_of
    from madpo_ray.search.trials import Trials
    from madpo_ray.search.tuner import search

    config = build.config
    objective = config.tune.objective
    trials = Trials(
        job=dataclasses.replace(train.policy_job(build), stage=STAGE.name),
        config=config,
        task=train.policy_task,
        measure=None if objective == "accuracy" else _measure,
    )
    outcomes = search(trials, max_concurrent=_concurrency(config))

    rows = table_of(outcomes, objective)
    _write_trials(build, outcomes, rows)

    # The best.
    best = best_settings(outcomes, objective)
    chosen = trials.config_of(best.trial.values)
    # The searched loss may need no margins, and these have some: they are not to be made again.
    has_rewards = {"with_rewards": reward.uses_rewards(config)}
    same_margins = with_changes(config.margins, "margins", has_rewards)
    save_config(chosen.model_copy(update={"margins": same_margins}), build.folder / BEST)
    return {
        "objective": OBJECTIVES[objective][0][0],
        "best": {
            "values": best.trial.settings,
            "mean": best.mean,
            "standard_error": best.standard_error,
            "seeds": best.num_seeds,
        },
        "trials": len(rows),
        **_count_steps(rows),
        "failed": sum(row["state"] == "failed" for row in rows),
        "stopped": sum(row["state"] == "stopped" for row in rows),
    }


def with_best(config: Config) -> Config:
    """A config with the searched settings of its search's best trial, and all else as it is."""
    best = load_config(STAGE.folder(config) / BEST)
    # Keys that decide no result may have changed since the search.
    settings = {key: getattr(best.train, key) for key in best.train.fingerprinted()}
    with_rewards = {"with_rewards": best.margins.with_rewards}
    return config.model_copy(
        update={
            "train": config.train.model_copy(update=settings),
            "margins": config.margins.model_copy(update=with_rewards),
        }
    )


def _write_trials(
    build: Build, outcomes: Sequence["TrialOutcome"], rows: Sequence[Mapping[str, Any]]
) -> None:
    """Writes the table of all trials, and pictures."""
    from madpo_ray.evaluation.charts import save_picture
    from madpo_ray.search.charts import search_charts
    from madpo_ray.search.outcomes import OBJECTIVES, importances

    space = build.config.search_space
    objective = build.config.tune.objective
    metrics = [name for name, _ in OBJECTIVES[objective]]
    shares = importances(outcomes, space, objective)
    found = {"objectives": metrics, "keys": list(space), "importances": shares, "trials": rows}
    write_json(build.folder / "trials.json", found)
    write_csv(build.folder / "trials.csv", rows)
    pictures = build.folder / "pictures"
    pictures.mkdir()
    for name, chart in search_charts(rows, list(space), metrics[0], shares).items():
        save_picture(chart, pictures / f"{name}.png")


def _measure(config: Config, job: "TrainingJob") -> dict[str, float]:
    """Reward and divergence of a trial's policy."""
    from madpo_ray.artifacts.manifest import model_folder
    from madpo_ray.cluster.connection import configure_data
    from madpo_ray.evaluation.sample_sets import PolicyFiles

    configure_data(config.cluster)  # an actor has options of its own
    policy = PolicyFiles(model_folder(job.output), job.base_folder)
    return measure_rewards(config, policy, BatchNotes(job.checkpoints / "in-progress"))


def _concurrency(config: Config) -> int:
    """Trials at a time. Raises UserError if they can never be placed together."""
    from madpo_ray.cluster.connection import alive_nodes
    from madpo_ray.cluster.placement import count_trainings
    from madpo_ray.search.space import trials_at_a_time

    wanted = trials_at_a_time(config)
    if config.cluster.autoscaling and wanted is not None:  # nodes may come
        return wanted
    fitting = count_trainings(alive_nodes(), config.cluster)
    if wanted is not None and wanted > fitting:
        raise UserError(
            f"tune.max_concurrent_trials: the cluster has room for {fitting} trainings of "
            f"{config.cluster.num_workers} workers at a time, and {wanted} are asked for"
        )
    return wanted or fitting or 1


def _count_steps(rows: list[dict[str, Any]]) -> dict[str, int]:
    """Steps that trials without an error trained, and would have trained without stopping."""
    trained = [row for row in rows if "step" in row and row["state"] != "failed"]
    return {
        "steps": sum(row["step"] for row in trained),
        "steps_without_stopping": sum(row["total_steps"] for row in trained),
    }


def describe(results: Mapping[str, Any]) -> Description:
    from madpo_ray.search.outcomes import format_values

    best = results["best"]
    mean = f"best {results['objective']} {best['mean']:.3f}"
    if best["standard_error"] is not None:
        mean += f" ± {best['standard_error']:.3f} over {best['seeds']} seeds"
    steps, complete = results["steps"], results["steps_without_stopping"]
    return [
        f"{results['trials']} trials, {results['stopped']} stopped early, {results['failed']} "
        f"failed; {steps} steps of {complete} ({1 - steps / max(complete, 1):.0%} saved)",
        "all trials read the margins and reference log-probs that stage margins had stored",
        f"{mean} with {format_values(best['values'])}; see best.yaml",
    ]


STAGE = Stage(
    name="tune",
    help="Search beta, c_min and c_max, or other keys of section train, over the stored margins.",
    settings=_settings,
    upstream=_upstream,
    content=_content,
    names=_names,
    is_wanted=lambda config: False,  # by its own command, or --until
    check=_check,
    check_upstream=_check_pair_weights,
    make=make,
    describe=describe,
    uses_dashboard=True,  # Tune frees a stopped trial's workers through its state API
)
