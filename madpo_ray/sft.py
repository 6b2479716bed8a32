"""Behind stage 1, where the config asks for it: supervised fine-tuning on the chosen responses, where policy and
reference start from."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from madpo_ray import pairs
from madpo_ray.artifacts import Inputs, building, require
from madpo_ray.batching import MicroBatch
from madpo_ray.cluster import connected
from madpo_ray.config import Config, SFTConfig, UserError, numerics_of, settings_of
from madpo_ray.launch import train_on_ray
from madpo_ray.logprobs import PairLogps
from madpo_ray.loop import Stateless, Terms
from madpo_ray.metrics import read_metrics
from madpo_ray.models import base_folder, load_exact, load_policy, load_tokenizer, model_inputs, prepare_for_training
from madpo_ray.tables import parquet_folder
from madpo_ray.worker import TrainingJob


def inputs(config: Config) -> Inputs:
    settings = {
        "pairs": pairs.inputs(config).fingerprint,
        "seed": config.run.seed,
        "model": numerics_of(config.model),
        "sft": settings_of(_section(config)),
    }
    return Inputs("sft", settings, {"model": model_inputs(config).fingerprint})


def folder(config: Config) -> Path:
    return config.run.folder / "sft"


def start_folder(config: Config) -> Path:
    """The folder that policy and reference start from: this stage's model, or the base model without it.

    Raises:
        UserError: the config asks for the stage, and it has not run, or was made from other inputs.
    """
    if config.sft is None:
        return base_folder(config)
    require(folder(config), inputs(config))
    return folder(config) / "model"


def start_inputs(config: Config) -> Inputs:
    """What identifies that start."""
    return model_inputs(config) if config.sft is None else inputs(config)


def _section(config: Config) -> SFTConfig:
    if config.sft is None:
        raise UserError("the config has no section sft: add one, `sft: {}` with the defaults, to start from it")
    return config.sft


@dataclass(frozen=True)
class SFTObjective(Stateless):
    """The mean of -log p over the step's response tokens; prompts count for nothing."""

    def __call__(self, outputs: Mapping[str, Tensor], batch: MicroBatch, *, training: bool) -> Terms:
        # The loop takes the mean over pairs: times pairs, over tokens, makes it the mean over tokens.
        loss = -outputs["logps"] * (batch.pairs_in_step / batch.response_tokens_in_step)  # (B,)
        return Terms(loss, {"entropy": outputs["entropy"]})


@dataclass(frozen=True)
class SFTTask:
    task_type: str = "CAUSAL_LM"
    columns: tuple[str, ...] = ()
    responses: tuple[str, ...] = ("chosen_ids",)

    def settings(self, config: Config) -> SFTConfig:
        return _section(config)

    def load(self, config: Config, base: Path, max_response_tokens: int) -> nn.Module:
        model = prepare_for_training(load_policy(base, config.model), _section(config), task_type=self.task_type)
        return PairLogps(model, max_response_tokens)

    def objective(self, config: Config) -> SFTObjective:
        return SFTObjective()

    def tokenizer(self, config: Config, base: Path) -> Any:
        return load_tokenizer(base, config.model)

    def fresh_base(self, config: Config, base: Path) -> nn.Module:
        return load_exact(base, config.model)


def run(config: Config) -> Path:
    """Trains the start of policy and reference; its artifact holds `model/` (LoRA merged in) and `metrics.jsonl`."""
    require(pairs.folder(config), pairs.inputs(config))
    stage = inputs(config)
    with building(folder(config), stage) as (partial, results):
        job = TrainingJob(
            task=SFTTask(),
            config=config,
            base=base_folder(config),
            source=parquet_folder(pairs.folder(config)),
            output=partial,
            experiment=stage.experiment,
        )
        with connected(config.cluster):
            outcome = train_on_ray(job)
        results.update(outcome.evaluation(read_metrics(partial / "metrics.jsonl")))
    return folder(config)


def describe(results: Mapping[str, Any]) -> str:
    """The stage's outcome in a line."""
    return f"step {results['step']}: eval_loss {results['eval_loss']:.4f} nats a token"
