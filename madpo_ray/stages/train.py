"""Stage train: the policy, on stored reference log-probs and margins, or on streamed ones."""

import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from madpo_ray import columns
from madpo_ray.artifacts.tables import read_split
from madpo_ray.config import Config
from madpo_ray.data.checks import check_budget
from madpo_ray.errors import UserError
from madpo_ray.stages import margins, pairs, reward, scores
from madpo_ray.stages.sft import initial_policy, initial_policy_content, stages_before_policy
from madpo_ray.stages.stage import (
    Build,
    Description,
    Stage,
    check_training,
    run_training,
    training_job,
)

if TYPE_CHECKING:
    from madpo_ray.training.job import PolicyTask, TrainingJob

# Torch, transformers and Ray Train are imported inside functions: they take seconds, and neither
# `--help` nor a wrong config should wait.

logger = logging.getLogger(__name__)


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


def _reads(config: Config) -> tuple[Stage, ...]:
    """What has to be finished: scores that are streamed need not be."""
    if _streams(config):
        return margins.STAGE.upstream(config)
    return _upstream(config)


def _streams(config: Config) -> bool:
    """Whether pairs are scored while the policy is trained on them."""
    return config.margins.mode == "stream" and not margins.STAGE.is_finished(config)


def check(config: Config) -> None:
    """Raises UserError if the loss reads margins and none will be scored, or as training would."""
    from madpo_ray.training.objectives import needs_margins

    if needs_margins(config.train) and not reward.uses_rewards(config):
        raise UserError(
            f"margins.with_rewards: train.loss_type {config.train.loss_type} needs margins: "
            "remove margins.with_rewards, or set it to true"
        )
    check_training(config, config.train, task_type="CAUSAL_LM")
    if pairs.STAGE.is_finished(config):
        check_budget(pairs.STAGE.rows(config), config.train, columns.RESPONSE_IDS)
        _check_pair_weights(config, pairs.STAGE.rows(config))


def check_pair_weights(config: Config) -> None:
    """Raises UserError if a pair's own weight is missing, negative or not finite."""
    _check_pair_weights(config, _rows(config))


def _check_pair_weights(config: Config, rows: Path) -> None:
    name = config.train.weight_column
    if name is None:
        return
    for split in (columns.TRAIN, columns.VALIDATION):
        table = read_split(rows, split, (columns.PAIR_ID, name))
        weights = table[name].to_numpy()
        bad = np.flatnonzero(~(np.isfinite(weights) & (weights >= 0)))
        if len(bad):
            ids = ", ".join(table[columns.PAIR_ID].take(bad[:5]).to_pylist())
            raise UserError(
                f"train.weight_column: {name} is missing, negative or not finite for {len(bad)} "
                f"pairs, such as {ids}: fix the column in data.files"
            )


def _rows(config: Config) -> Path:
    """The rows that are trained on."""
    stored_in = pairs.STAGE if _streams(config) else margins.STAGE
    return stored_in.rows(config)


def policy_task(config: Config) -> "PolicyTask":
    """What is trained, with the columns that loss and metrics read."""
    from madpo_ray.training.job import PolicyTask
    from madpo_ray.training.objectives import LOSSES

    names = [*LOSSES[config.train.loss_type].columns]
    if reward.uses_rewards(config) and columns.MARGIN not in names:
        names.append(columns.MARGIN)
    if config.train.weight_column is not None:
        names.append(config.train.weight_column)
    return PolicyTask(columns=tuple(names))


def policy_job(build: Build) -> "TrainingJob":
    """The training on stored margins. A trial of a search is the same job, replaced."""
    config = build.config
    return training_job(
        build,
        STAGE.name,
        policy_task(config),
        config.train,
        initial=initial_policy(config),
        rows=margins.STAGE.rows(config),
    )


def make(build: Build) -> dict[str, Any]:
    """Trains the policy; writes `model/` (a LoRA adapter or full weights) and `metrics.jsonl`."""
    config = build.config
    job = policy_job(build)
    if _streams(config):
        streamed = scores.streamed_scores(config, build.notes)
        job = dataclasses.replace(job, rows=pairs.STAGE.rows(config), streamed=streamed)
        _restore_lost_scores(job, build)
    elif margins.STAGE.require(config)["rejects"]:
        # A streamed training has these rows in its order: its checkpoints are of other steps.
        job = dataclasses.replace(job, trial="scored")
    return run_training(job, config.cluster)


def _restore_lost_scores(job: "TrainingJob", build: Build) -> None:
    """Scores pairs again that were trained on before the newest checkpoint, and have no scores."""
    from madpo_ray.data.order import Order
    from madpo_ray.training.checkpoints import newest_step

    newest = newest_step(job.checkpoints)
    streamed = job.streamed
    if newest == 0 or streamed is None or not streamed.scorers:
        return
    order = Order(job.order_spec(build.config.cluster.num_workers))
    step = min(newest, order.steps_per_epoch, order.total_steps)
    members = [order.members(number)[0] for number in range(order.first_micro_batch(step))]
    if not members:
        return
    ids = read_split(job.rows, columns.TRAIN, [columns.PAIR_ID])[columns.PAIR_ID]
    trained_on = ids.take(np.concatenate(members))
    num_lost = len(trained_on) - streamed.find(trained_on).num_rows
    if num_lost:
        logger.warning("%d pairs that were trained on have lost their scores", num_lost)
        scores.score(build.config, scores.missing_passes(build.config), build.notes)


def describe(results: Mapping[str, Any]) -> Description:
    return [
        f"step {results['step']}: eval_loss {results['eval_loss']:.4f}, "
        f"eval_rewards/accuracies {results['eval_rewards/accuracies']:.3f}, "
        f"eval_rewards/margins {results['eval_rewards/margins']:.4f}"
    ]


STAGE = Stage(
    name="train",
    help="Train the policy on stored margins, or score them meanwhile.",
    settings=_settings,
    upstream=_upstream,
    reads=_reads,
    streams=_streams,
    content=initial_policy_content,
    check=check,
    check_upstream=check_pair_weights,
    make=make,
    describe=describe,
)
