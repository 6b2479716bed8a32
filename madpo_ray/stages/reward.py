"""Stage reward: a Bradley-Terry reward model on the training pairs."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from madpo_ray import columns
from madpo_ray.artifacts.manifest import model_folder
from madpo_ray.artifacts.tables import read_split
from madpo_ray.config import Config
from madpo_ray.data.checks import check_budget
from madpo_ray.data.splits import require_full_folds
from madpo_ray.errors import UserError
from madpo_ray.models.source import base_model, check_model, model_inputs
from madpo_ray.stages import pairs
from madpo_ray.stages.stage import (
    Build,
    Description,
    Stage,
    check_training,
    run_training,
    training_job,
)


def _settings(config: Config) -> dict[str, Any]:
    settings = config.reward.fingerprinted()
    del settings["ensemble"]  # the other members are not trained here
    model = config.model.numerics()
    del model["load_in_4bit"]  # of policies only
    return {"seed": config.run.seed, "model": model, "reward": settings}


def _content(config: Config) -> dict[str, Any]:
    return {"model": model_inputs(config.model).fingerprint}


def uses_rewards(config: Config) -> bool:
    """Whether margins are scored: as the config asks, or by default if the loss reads them."""
    if config.margins.with_rewards is not None:
        return config.margins.with_rewards
    # Imports torch, and neither `--help` nor a wrong config should wait for it.
    from madpo_ray.training.objectives import needs_margins

    return needs_margins(config.train)


def trains_model(config: Config) -> bool:
    """Whether rewards are those of a model that this stage trains."""
    return uses_rewards(config) and config.reward.source == "trained"


def _check(config: Config) -> None:
    if config.reward.source != "trained":
        raise UserError(
            f"reward.source: {config.reward.source} is not trained here: run stage margins"
        )
    check_model(config.model)
    check_training(config, config.reward, task_type="SEQ_CLS")
    if pairs.STAGE.is_finished(config):
        check_budget(pairs.STAGE.rows(config), config.reward, columns.RESPONSE_IDS)
        if config.reward.folds > 1:
            names = [columns.GROUP_HASH]
            table = read_split(pairs.STAGE.rows(config), columns.TRAIN, names)
            require_full_folds(table[columns.GROUP_HASH].to_numpy(), config.reward.folds)


def models(config: Config) -> list[Path]:
    """Folders of the trained reward models, one per fold."""
    folder = STAGE.folder(config)
    return [model_folder(part) for part in _parts(folder, config.reward.folds)]


def _parts(folder: Path, num_folds: int) -> list[Path]:
    """Where the training of each fold is."""
    if num_folds == 1:
        return [folder]
    return [folder / f"fold-{fold}" for fold in range(num_folds)]


def make(build: Build) -> dict[str, Any]:
    """Trains the reward model; writes `model/` (LoRA merged in) and `metrics.jsonl`.

    With `reward.folds` above 1 there is one of them in each of `fold-0/`, `fold-1/`, ...
    """
    from madpo_ray.training.job import RewardTask

    config = build.config
    job = training_job(
        build,
        STAGE.name,
        RewardTask(),
        config.reward,
        initial=base_model(config.model, config.run),
        rows=pairs.STAGE.rows(config),
    )
    num_folds = config.reward.folds
    if num_folds == 1:
        return {"folds": [run_training(job, config.cluster)]}
    results = []
    for fold, output in enumerate(_parts(build.folder, num_folds)):
        output.mkdir()
        own = dataclasses.replace(job, output=output, trial=output.name, fold=(fold, num_folds))
        results.append(run_training(own, config.cluster))
    return {"folds": results}


def describe(results: Mapping[str, Any]) -> Description:
    """One line per reward model."""
    folds = results["folds"]
    return [
        (f"fold {number}: " if len(folds) > 1 else "")
        + f"step {fold['step']}: eval_loss {fold['eval_loss']:.4f}, "
        f"eval_accuracy {fold['eval_accuracy']:.3f}"
        for number, fold in enumerate(folds)
    ]


STAGE = Stage(
    name="reward",
    help="Train the Bradley-Terry reward model.",
    settings=_settings,
    content=_content,
    upstream=lambda config: (pairs.STAGE,),
    is_wanted=trains_model,
    check=_check,
    make=make,
    describe=describe,
)
