"""The methods of the paper's experiment, run on the same pairs.

All train for the same steps from the same initial policy. MADPO runs on margins of a reward model
that has seen the pairs, as in the paper; on cross-fitted ones; and on cross-fitted and calibrated
ones.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from run_demo import copy_run

from madpo_ray import pipeline
from madpo_ray.artifacts.manifest import read_manifest
from madpo_ray.artifacts.tables import read_columns, read_split
from madpo_ray.atomic import write_json, write_text
from madpo_ray.cli import say
from madpo_ray.columns import GROUP, MARGIN, SPLIT, TEXT_COLUMNS, TRAIN
from madpo_ray.config import Config, PolicyConfig, parse_config, with_changes
from madpo_ray.data.messages import from_text
from madpo_ray.errors import UserError
from madpo_ray.scoring.report import describe_weights
from madpo_ray.stages import margins, reward, train
from madpo_ray.stages.margins_report import weights_of

# Where margins come from: the reward model's folds, and its calibration. `weighted` has the weights
# of `seen` as columns, for the ablation; `true` has the columns of true scores.
MARGINS: dict[str, dict[str, dict[str, Any]]] = {
    "seen": {"reward": {"folds": 1}, "margins": {"calibration": "none"}},
    "weighted": {"margins": {"with_rewards": False}},
    "folds": {"reward": {"folds": 2}, "margins": {"calibration": "none"}},
    "calibrated": {"reward": {"folds": 2}, "margins": {"calibration": "temperature"}},
    "true": {"margins": {"calibration": "none"}},
}
ABLATIONS = ("amplify_only", "dampen_only")
# A method: its margins, and its keys of section train. beta is 0.1, as in the paper, except in one:
# for small margins MADPO's amplifier is about c_max, as if beta were that much smaller.
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "dpo": ("seen", {"loss_type": "sigmoid"}),
    "dpo_small_beta": ("seen", {"loss_type": "sigmoid", "beta": 0.025}),
    "ipo": ("seen", {"loss_type": "ipo_sum"}),
    "beta_dpo": ("seen", {"loss_type": "beta_dpo", "beta_dpo_variant": "madpo_paper"}),
    "madpo": ("seen", {"loss_type": "madpo"}),
    "madpo_folds": ("folds", {"loss_type": "madpo"}),
    "madpo_calibrated": ("calibrated", {"loss_type": "madpo"}),
    "madpo_true": ("true", {"loss_type": "madpo"}),
    # MADPO's amplifier c with its part below 1, or above 1, set to 1.
    **{name: ("weighted", {"loss_type": "sigmoid", "weight_column": name}) for name in ABLATIONS},
}
UNCOMPARED = {"methods", "noises", "seeds", "storage", "temperatures", "tiers"}
WEIGHTING = {"c_min": 0.25, "c_max": 4.0, "lmbda": 1.0, "tau": 7.0}
LORA = {
    "use_peft": True,
    "lora_r": 16,
    "lora_alpha": 32,
    "lora_target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "adam_beta1": 0.9,
    "adam_beta2": 0.95,
    "weight_decay": 0.01,
    "warmup_steps": 0.03,
    "global_batch_size": 32,
    "per_device_train_batch_size": 16,  # beta-DPO's statistics are of a step, on two workers
    "logging_steps": 4,
}
# Early stopping after three evaluations without improvement, as in the paper.
REWARD = {
    **LORA,
    "learning_rate": 1e-3,
    "num_train_epochs": 3,
    "eval_steps": 16,
    "metric_for_best_model": "eval_loss",
    "early_stopping_patience": 3,
}


def changed(raw: dict[str, Any], name: str, *sections: dict[str, dict[str, Any]]) -> Config:
    """The config of a run with some keys replaced."""
    merged = {key: dict(value) for key, value in raw.items()}
    for changes in sections:
        for section, values in changes.items():
            merged.setdefault(section, {}).update(values)
    merged["run"]["name"] = name
    return parse_config(merged)


def write_rows(file: Path, rows: list[dict[str, Any]]) -> None:
    write_text(file, "".join(json.dumps(row) + "\n" for row in rows))


def require_same_arguments(
    file: Path, arguments: argparse.Namespace, constants: dict[str, Any]
) -> None:
    """Refuses to add to results that other arguments made, apart from which of them to make."""
    given = {**vars(arguments), **constants}
    now = {name: str(value) for name, value in given.items() if name not in UNCOMPARED}
    if file.exists() and (then := json.loads(file.read_text())) != now:
        raise UserError(f"{file.parent} was made with {then}, not {now}: set another --storage")
    write_json(file, now)


def run_methods(
    raw: dict[str, Any],
    sections: list[dict[str, dict[str, Any]]],
    folder: Path,
    methods: list[str],
) -> list[Config]:
    """Scores the margins of each kind, and trains each method on those of its own."""
    scored: dict[str, Config] = {}
    trained = []
    for name in methods:
        kind, settings = METHODS[name]
        if kind == "weighted":
            score_margins("seen", raw, sections, folder, scored)
        source = score_margins(kind, raw, sections, folder, scored)
        run = source.run.model_copy(update={"name": name})
        keys = with_changes(source.train, "train", settings)
        config = source.model_copy(update={"run": run, "train": keys})
        copy_run(source.run.folder, config.run.folder)
        pipeline.run_all(config, say=say, until=train.STAGE)
        trained.append(config)
    return trained


def score_margins(
    kind: str,
    raw: dict[str, Any],
    sections: list[dict[str, dict[str, Any]]],
    folder: Path,
    scored: dict[str, Config],
) -> Config:
    """A run with the margins of a kind, which is added to `scored`."""
    if kind in scored:
        return scored[kind]
    own = [*sections, MARGINS[kind]]
    if kind == "weighted":
        own.append(weighted_data(scored["seen"], folder))
    if kind == "true":
        own.append(true_rewards(changed(raw, "any", *sections)))
    config = changed(raw, f"margins-{kind}", *own)
    # Reward models and the reference pass are those of `folds`.
    if kind == "calibrated" and "folds" in scored:
        copy_run(scored["folds"].run.folder, config.run.folder)
    pipeline.run_all(config, say=say, until=margins.STAGE)
    scored[kind] = config
    return config


def weighted_data(seen: Config, folder: Path) -> dict[str, Any]:
    """Section data of the pairs with the weights of the ablations."""
    file = folder / "weighted.jsonl"
    write_weighted(seen, file)  # again: other settings give other weights
    return {"data": {"files": [str(file)], "keep_columns": [*seen.data.kept_columns, *ABLATIONS]}}


def true_rewards(config: Config) -> dict[str, Any]:
    """Section reward for the true scores of the data."""
    names = [config.evaluate.chosen_score_column, config.evaluate.rejected_score_column]
    return {"reward": {"source": "columns", "source_columns": names}}


def write_weighted(scored: Config, file: Path) -> None:
    """The scored pairs with the weights of both ablations."""
    names = [*TEXT_COLUMNS, SPLIT, GROUP, MARGIN, *scored.data.kept_columns]
    table = read_columns(margins.STAGE.rows(scored), names)
    weights = ablated_weights(table[MARGIN].to_numpy(), scored.train)
    rows = table.drop_columns([MARGIN]).to_pylist()
    for place, row in enumerate(rows):
        row |= {name: float(own[place]) for name, own in zip(ABLATIONS, weights, strict=True)}
        for name in TEXT_COLUMNS:
            row[name] = from_text(row[name])
    write_rows(file, rows)


def ablated_weights(margin: np.ndarray, settings: PolicyConfig) -> tuple[np.ndarray, np.ndarray]:
    """MADPO's weights (N,) with amplification only, that is |margin| below tau, and without it."""
    weights = weights_of(margin, settings)
    is_amplified = np.abs(margin) < settings.tau
    return np.where(is_amplified, weights, 1.0), np.where(is_amplified, 1.0, weights)


def describe_run(config: Config) -> dict[str, Any]:
    """What the stages found, the weights, and the seconds of each stage."""
    found: dict[str, Any] = {"final": train.STAGE.require(config), "seconds": {}}
    stages = pipeline.wanted_stages(config, train.STAGE)
    if reward.STAGE in stages:  # not for true margins, and not for weights that are columns
        found["reward"] = reward.STAGE.require(config)
    found["margins"] = margins.STAGE.require(config)
    for stage in stages:
        manifest = read_manifest(stage.folder(config))
        assert manifest is not None
        found["seconds"][stage.name] = manifest["seconds"]
    if config.train.loss_type == "madpo":
        rows = read_split(margins.STAGE.rows(config), TRAIN, [MARGIN])[MARGIN].to_numpy()
        weights = weights_of(rows, config.train)
        found["negative_fraction"] = float(np.mean(rows < 0))
        found["weight"] = describe_weights(weights)
    return found


def mean_with_error(values: Sequence[float]) -> str:
    """The mean, and its standard error if there are several values."""
    if len(values) == 1:
        return f"{values[0]:.3f}"
    error = np.std(values, ddof=1) / len(values) ** 0.5
    return f"{np.mean(values):.3f} ± {error:.3f}"
