"""Stage reward: a Bradley-Terry reward model on the training pairs."""

from collections.abc import Mapping
from typing import Any

from madpo_ray.config import Config
from madpo_ray.errors import UserError
from madpo_ray.models.source import base_model, check_model, model_inputs
from madpo_ray.stages import pairs
from madpo_ray.stages.stage import Build, Description, Stage, check_training, train, training_job


def _settings(config: Config) -> dict[str, Any]:
    return {
        "seed": config.run.seed,
        "model": config.model.numerics(),
        "reward": config.reward.fingerprinted(),
    }


def _content(config: Config) -> dict[str, Any]:
    return {"model": model_inputs(config.model).fingerprint}


def uses_rewards(config: Config) -> bool:
    """Whether margins are scored: as the config asks, or by default if the loss reads them."""
    if config.margins.with_rewards is not None:
        return config.margins.with_rewards
    # Imports torch, and neither `--help` nor a wrong config should wait for it.
    from madpo_ray.training.objectives import needs_margins

    return needs_margins(config.train)


def is_trained(config: Config) -> bool:
    """Whether rewards are those of a model that this stage trains."""
    return uses_rewards(config) and config.reward.source == "trained"


def _check(config: Config) -> None:
    if config.reward.source != "trained":
        raise UserError(
            f"reward.source: {config.reward.source} is not trained here: run stage margins"
        )
    check_model(config.model)
    check_training(config, config.reward, task_type="SEQ_CLS")


def make(build: Build) -> dict[str, Any]:
    """Trains the reward model; writes `model/` (LoRA merged in) and `metrics.jsonl`."""
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
    return train(job, config.cluster)


def describe(results: Mapping[str, Any]) -> Description:
    return [
        f"step {results['step']}: eval_loss {results['eval_loss']:.4f}, "
        f"eval_accuracy {results['eval_accuracy']:.3f}"
    ]


STAGE = Stage(
    name="reward",
    help="Train the Bradley-Terry reward model.",
    settings=_settings,
    content=_content,
    upstream=lambda config: (pairs.STAGE,),
    is_wanted=is_trained,
    check=_check,
    make=make,
    describe=describe,
)
