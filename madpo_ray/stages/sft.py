"""Optional stage after `pairs`: supervised fine-tuning on the chosen responses.

Its model is the initial policy and the reference.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from madpo_ray import columns
from madpo_ray.artifacts.manifest import Inputs
from madpo_ray.config import Config
from madpo_ray.data.checks import check_budget
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
    assert config.sft is not None
    return {
        "seed": config.run.seed,
        "model": config.model.numerics(),
        "sft": config.sft.fingerprinted(),
    }


def _content(config: Config) -> dict[str, Any]:
    return {"model": model_inputs(config.model).fingerprint}


def _is_wanted(config: Config) -> bool:
    return config.sft is not None


def _check(config: Config) -> None:
    check_model(config.model)
    if config.sft is None:
        raise UserError(
            "the config has no section sft: add one, `sft: {}` with the defaults, to fine-tune "
            "the initial policy"
        )
    check_training(config, config.sft, task_type="CAUSAL_LM")
    if pairs.STAGE.is_finished(config):
        check_budget(pairs.STAGE.rows(config), config.sft, (columns.CHOSEN_IDS,))


def make(build: Build) -> dict[str, Any]:
    """Trains the model; writes `model/` (LoRA merged in) and `metrics.jsonl`."""
    from madpo_ray.training.job import SFTTask

    config = build.config
    assert config.sft is not None
    job = training_job(
        build,
        STAGE.name,
        SFTTask(),
        config.sft,
        initial=base_model(config.model, config.run),
        rows=pairs.STAGE.rows(config),
    )
    return run_training(job, config.cluster)


def describe(results: Mapping[str, Any]) -> Description:
    return [f"step {results['step']}: eval_loss {results['eval_loss']:.4f} nats per token"]


STAGE = Stage(
    name="sft",
    help="Fine-tune the initial policy on the chosen responses, if the config has a section sft.",
    settings=_settings,
    content=_content,
    upstream=lambda config: (pairs.STAGE,),
    is_wanted=_is_wanted,
    check=_check,
    make=make,
    describe=describe,
)


def initial_policy(config: Config) -> Path:
    """The folder that policy and reference start from: this stage's model, or the base model.

    Raises:
        UserError: the config asks for the stage, and it has not run, or had other inputs.
    """
    if config.sft is None:
        return base_model(config.model, config.run)
    STAGE.require(config)
    return STAGE.model(config)


def initial_policy_inputs(config: Config) -> Inputs:
    """What identifies the initial policy."""
    return model_inputs(config.model) if config.sft is None else STAGE.inputs(config)


def initial_policy_content(config: Config) -> dict[str, Any]:
    """Its hash, for a stage that starts from it; `sft`, if wanted, is upstream instead."""
    if config.sft is not None:
        return {}
    return {"initial_policy": model_inputs(config.model).fingerprint}


def stages_before_policy(config: Config) -> tuple[Stage, ...]:
    """The stage that makes the initial policy, if any."""
    return () if config.sft is None else (STAGE,)
