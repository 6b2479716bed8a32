"""Stage train: the policy, on stored reference log-probs and margins."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from madpo_ray import columns
from madpo_ray.artifacts.tables import read_split
from madpo_ray.config import Config
from madpo_ray.errors import UserError
from madpo_ray.stages import margins, reward
from madpo_ray.stages.sft import initial_policy, initial_policy_inputs, stages_before_policy
from madpo_ray.stages.stage import Build, Report, Stage

if TYPE_CHECKING:
    from madpo_ray.training.job import TrainingJob

# Torch, transformers and Ray Train take seconds to import, and `--help` does not need them: they
# are imported inside functions.


def _settings(config: Config) -> dict[str, Any]:
    from madpo_ray.training.objectives import LOSSES

    settings: dict[str, Any] = {
        "seed": config.run.seed,
        "model": config.model.numerics(),
        "train": config.train.fingerprinted(),
    }
    # Running statistics are of a micro-batch of all workers.
    if LOSSES[config.train.loss_type].statistics is not None:
        settings["num_workers"] = config.cluster.num_workers
    return settings


def _upstream(config: Config) -> tuple[Stage, ...]:
    return (*stages_before_policy(config), margins.STAGE)


def _content(config: Config) -> dict[str, Any]:
    return {"initial_policy": initial_policy_inputs(config).fingerprint}


def check(config: Config) -> None:
    """Raises UserError if the loss reads margins and none will be scored."""
    from madpo_ray.training.objectives import needs_margins

    if needs_margins(config.train) and not reward.uses_rewards(config):
        raise UserError(
            f"margins.with_rewards: train.loss_type {config.train.loss_type} needs margins: "
            "remove margins.with_rewards, or set it to true"
        )


def check_weights(config: Config) -> None:
    """Raises UserError if a pair's own weight is missing, negative or not finite."""
    name = config.train.weight_column
    if name is None:
        return
    for split in (columns.TRAIN, columns.VALIDATION):
        table = read_split(margins.STAGE.rows(config), split, (columns.PAIR_ID, name))
        weights = table[name].to_numpy()
        bad = np.flatnonzero(~(np.isfinite(weights) & (weights >= 0)))
        if len(bad):
            ids = ", ".join(table[columns.PAIR_ID].take(bad[:5]).to_pylist())
            raise UserError(
                f"train.weight_column: {name} is missing, negative or not finite for {len(bad)} "
                f"pairs, such as {ids}: fix the column in data.files"
            )


def policy_job(build: Build) -> "TrainingJob":
    """The training that the config describes. A trial of a search is the same job, replaced."""
    from madpo_ray.training.job import PolicyTask, TrainingJob
    from madpo_ray.training.objectives import LOSSES

    config = build.config
    names = [*LOSSES[config.train.loss_type].columns]
    if reward.uses_rewards(config) and columns.MARGIN not in names:
        names.append(columns.MARGIN)
    if config.train.weight_column is not None:
        names.append(config.train.weight_column)
    return TrainingJob(
        stage=STAGE.name,
        fingerprint=build.fingerprint,
        task=PolicyTask(columns=tuple(names)),
        settings=config.train,
        model=config.model,
        seed=config.run.seed,
        num_threads=config.cluster.num_threads,
        base_folder=initial_policy(config),
        rows=margins.STAGE.rows(config),
        output=build.folder,
        storage=config.run.folder / "ray",
        deadline=build.deadline,
    )


def make(build: Build) -> dict[str, Any]:
    """Trains the policy; writes `model/` (a LoRA adapter or full weights) and `metrics.jsonl`."""
    from madpo_ray.training.metrics import read_metrics
    from madpo_ray.training.trainer import train_on_ray

    outcome = train_on_ray(policy_job(build), build.config.cluster)
    return outcome.evaluation(read_metrics(build.folder / "metrics.jsonl"))


def describe(results: Mapping[str, Any]) -> Report:
    return [
        f"step {results['step']}: eval_loss {results['eval_loss']:.4f}, "
        f"eval_rewards/accuracies {results['eval_rewards/accuracies']:.3f}, "
        f"eval_rewards/margins {results['eval_rewards/margins']:.4f}"
    ]


STAGE = Stage(
    name="train",
    help="Train the policy on the stored margins.",
    settings=_settings,
    upstream=_upstream,
    content=_content,
    check=check,
    check_upstream=check_weights,
    make=make,
    describe=describe,
)
