"""Stage 2: a Bradley-Terry reward model on the training pairs, and the temperature that calibrates its margins."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from madpo_ray import pairs
from madpo_ray.artifacts import Inputs, building, require, write_json
from madpo_ray.batching import MicroBatch
from madpo_ray.calibration import calibration_report
from madpo_ray.cluster import connected
from madpo_ray.config import Config, ModelConfig, RewardConfig, numerics_of, settings_of
from madpo_ray.launch import train_on_ray
from madpo_ray.logprobs import PairRewards
from madpo_ray.loop import Stateless, Terms
from madpo_ray.losses import bradley_terry_loss
from madpo_ray.models import (
    base_folder,
    load_reward_model,
    load_tokenizer,
    model_inputs,
    prepare_for_training,
)
from madpo_ray.plan import TOKEN_COLUMNS
from madpo_ray.scoring import score_dataset
from madpo_ray.tables import parquet_folder, read_split
from madpo_ray.worker import TrainingJob


def inputs(config: Config) -> Inputs:
    settings = {
        "pairs": pairs.inputs(config).fingerprint,
        "seed": config.run.seed,
        "model": numerics_of(config.model),
        "reward": settings_of(config.reward),
    }
    return Inputs("reward", settings, {"model": model_inputs(config).fingerprint})


def folder(config: Config) -> Path:
    return config.run.folder / "reward"


@dataclass(frozen=True)
class RewardObjective(Stateless):
    """Bradley-Terry, with TRL's optional pull of the rewards' sum towards 0."""

    center_rewards_coefficient: float

    def __call__(self, outputs: Mapping[str, Tensor], batch: MicroBatch, *, training: bool) -> Terms:
        chosen, rejected = outputs["rewards"].chunk(2)  # (B,) each
        loss = bradley_terry_loss(chosen, rejected) + self.center_rewards_coefficient * (chosen + rejected) ** 2
        metrics = {
            "accuracy": (chosen > rejected).float(),
            "margin": chosen - rejected,
            "mean_reward": (chosen + rejected) / 2,
            "min_reward": torch.minimum(chosen, rejected),
            "max_reward": torch.maximum(chosen, rejected),
        }
        return Terms(loss, metrics)


@dataclass(frozen=True)
class RewardTask:
    task_type: str = "SEQ_CLS"
    columns: tuple[str, ...] = ()
    responses: tuple[str, ...] = TOKEN_COLUMNS[1:]

    def settings(self, config: Config) -> RewardConfig:
        return config.reward

    def load(self, config: Config, base: Path, max_response_tokens: int) -> nn.Module:
        model = self._classifier(config, base, config.model)
        return PairRewards(prepare_for_training(model, config.reward, task_type=self.task_type))

    def objective(self, config: Config) -> RewardObjective:
        return RewardObjective(config.reward.center_rewards_coefficient)

    def tokenizer(self, config: Config, base: Path) -> Any:
        """Plain transformers reads the reward at the last token that is not padding, so padding must not end a
        response."""
        tokenizer = load_tokenizer(base, config.model)
        special = [tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.bos_token_id, *tokenizer.all_special_ids]
        tokenizer.pad_token_id = next(
            int(token) for token in [*special, 0, 1] if token is not None and token != tokenizer.eos_token_id
        )
        return tokenizer

    def fresh_base(self, config: Config, base: Path) -> nn.Module:
        """Merged, since whoever scores with it wants one forward, not two; in float32, where small changes count."""
        return self._classifier(config, base, config.model.model_copy(update={"dtype": "float32"}))

    def _classifier(self, config: Config, base: Path, settings: ModelConfig) -> nn.Module:
        model: Any = load_reward_model(base, settings)
        model.config.pad_token_id = self.tokenizer(config, base).pad_token_id
        return model  # type: ignore[no-any-return]


def run(config: Config) -> Path:
    """Trains the reward model; its artifact holds `model/`, `metrics.jsonl` and `calibration.json`."""
    require(pairs.folder(config), pairs.inputs(config))
    stage = inputs(config)
    base = base_folder(config)
    with building(folder(config), stage) as (partial, results):
        job = TrainingJob(
            task=RewardTask(),
            config=config,
            base=base,
            source=parquet_folder(pairs.folder(config)),
            output=partial,
            experiment=stage.experiment,
        )
        with connected(config.cluster):
            train_on_ray(job)
            report = calibration_report(_validation_margins(config, partial / "model"))
        write_json(partial / "calibration.json", report)
        results.update(report)
    return folder(config)


def _validation_margins(config: Config, model: Path) -> Any:
    """Margins (N,) of the validation pairs, in the reward model's own units."""
    import ray.data

    held_out = read_split(parquet_folder(pairs.folder(config)), "validation", ("pair_id", *TOKEN_COLUMNS))
    scored = score_dataset(
        ray.data.from_arrow(held_out),
        config.cluster,
        num_rows=held_out.num_rows,
        batch_size=config.margins.batch_size,
        model=config.model,
        micro_batch_size=config.reward.per_device_eval_batch_size,
        reward_model=model,
    )
    table = scored.select_columns(["chosen_reward", "rejected_reward"]).to_pandas()
    return (table["chosen_reward"] - table["rejected_reward"]).to_numpy()


def describe(results: Mapping[str, Any]) -> str:
    """The stage's outcome in one line."""
    low, high = results["accuracy_interval"]
    accuracy = f"validation accuracy {results['accuracy']:.3f} (95 % {low:.3f} to {high:.3f})"
    if results["temperature"] is None:
        return f"{accuracy}; not calibrated: {results['reason']}"
    return (
        f"{accuracy}, temperature {results['temperature']:.2f}, ECE {results['ece_before']:.3f} -> "
        f"{results['ece_after']:.3f}, Brier {results['brier_before']:.3f} -> {results['brier_after']:.3f}"
    )
