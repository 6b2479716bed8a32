"""Other finished runs, whose policies are compared with this one's."""

import hashlib
import json
import logging
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import madpo_ray
from madpo_ray import columns
from madpo_ray.artifacts.manifest import damage, model_folder, read_manifest
from madpo_ray.artifacts.tables import read_split, rows_folder
from madpo_ray.config import Config, ModelConfig, load_config
from madpo_ray.errors import UserError
from madpo_ray.evaluation.sample_sets import POLICY, REFERENCE, PolicyFiles
from madpo_ray.models.limits import count_embeddings
from madpo_ray.models.source import fetch_model, model_inputs
from madpo_ray.stages import pairs, sft, train
from madpo_ray.stages.sft import initial_policy

logger = logging.getLogger(__name__)

KEY = "evaluate.compare_with"


def run_folders(config: Config) -> dict[str, Path]:
    """The other runs, by the names that tables show.

    Raises:
        UserError: two have the same name.
    """
    folders = [Path(folder) for folder in config.evaluate.compare_with]
    names = {folder.name: folder for folder in folders}
    if len(names) < len(folders) or {POLICY, REFERENCE} & set(names):
        raise UserError(
            f"{KEY}: folders need different names, other than {POLICY} and {REFERENCE}: "
            f"{', '.join(folder.name for folder in folders)}"
        )
    return names


def check_runs(config: Config) -> None:
    """Raises UserError if another run has no complete policy.

    Of weights, only those of an adapter's base are read, to hash them.
    """
    for folder in run_folders(config).values():
        find_policy(folder, config)


def find_policy(folder: Path, config: Config) -> PolicyFiles:
    """The policy of another run, wherever that run is now.

    Raises:
        UserError: the training is not finished or not complete, or an adapter's base is gone or
            has other bits than this config's.
    """
    trained = folder / train.STAGE.name
    manifest = _training_manifest(folder)
    if lost := damage(trained):
        raise UserError(f"{KEY}: {trained} is damaged: {'; '.join(lost)}")
    policy = model_folder(trained)
    if not (policy / "adapter_config.json").exists():
        return PolicyFiles(policy, policy)
    return PolicyFiles(policy, _base_of(folder, manifest["inputs"], config))


def _training_manifest(run: Path) -> dict[str, Any]:
    """Raises UserError if the run has no finished training."""
    manifest = read_manifest(run / train.STAGE.name)
    if manifest is None:
        raise UserError(f"{KEY}: {run} has no finished training: give the folder of a run")
    return manifest


def _base_of(folder: Path, made_from: dict[str, Any], own: Config) -> Path:
    """The model that a run's adapter was trained on. What the adapter names is not trusted.

    Args:
        made_from: the inputs in the training's manifest.

    Raises:
        UserError: the run's config, or its folder, has another model by now.
    """
    config_file = folder / "config.yaml"
    if not config_file.is_file():
        raise UserError(
            f"{KEY}: {folder} has an adapter and no config.yaml that names its base: "
            "`madpo-ray run` writes one"
        )
    config = load_config(config_file)
    if config.model.load_in_4bit != own.model.load_in_4bit:
        raise UserError(f"{KEY}: model.load_in_4bit of {folder} differs from this config's")
    if made_from["package"] != {"madpo_ray": madpo_ray.__version__}:
        raise UserError(f"{KEY}: {folder} was trained by another version of madpo_ray")

    # The model in the run: fine-tuned, converted, or with another chat template.
    expected = made_from["upstream"].get(sft.STAGE.name) or made_from["content"]["initial_policy"]
    in_run = {
        sft.STAGE.name: model_folder(folder / sft.STAGE.name),
        "model": folder / "model",
    }
    for name, base in in_run.items():
        found = read_manifest(folder / name)
        if found is not None and found["fingerprint"] == expected:
            return base

    # The model of its config.
    if sft.STAGE.name not in made_from["upstream"]:
        key = f"{KEY}: {folder.name}"
        base = fetch_model(config.model, key=key)
        if base.is_dir() and model_inputs(config.model, key=key).fingerprint == expected:
            return base
    raise UserError(
        f"{KEY}: the model that {folder} was trained from is gone or was made again: restore it, "
        "or train again under another run.name"
    )


def require_unseen_pairs(config: Config) -> None:
    """Raises UserError if another run's policy has trained on pairs of this run's split test.

    Splits follow `run.seed`, and groups (by default, prompts) are compared.
    """
    tested = _groups(pairs.STAGE.folder(config), columns.TEST)
    for name, folder in run_folders(config).items():
        theirs = folder / pairs.STAGE.name
        if read_manifest(theirs) is None:
            logger.warning("%s has no pairs any more: whether it has seen these is not known", name)
            continue
        num_seen = int(np.isin(tested, _groups(theirs, columns.TRAIN)).sum())
        if num_seen:
            raise UserError(
                f"{KEY}: {name} was trained on {num_seen} of the {len(tested)} pairs of this run's "
                "split test, and would win by that: compare runs of the same run.seed and "
                "fractions, or fix the splits by data.split_column"
            )


def _groups(artifact: Path, split: str) -> np.ndarray:
    """The hash of each pair's group, (pairs,)."""
    found = read_split(rows_folder(artifact), split, [columns.GROUP_HASH])
    groups: np.ndarray = found[columns.GROUP_HASH].to_numpy()
    return groups


def runs_content(config: Config) -> dict[str, str]:
    """What the other policies are: hashes of what they were made from, and of their files."""
    found = {}
    for name, folder in run_folders(config).items():
        manifest = _training_manifest(folder)
        parts = json.dumps([manifest["inputs"], manifest["files"]], sort_keys=True)
        found[f"run {name}"] = hashlib.sha256(parts.encode()).hexdigest()
    return found


def require_same_tokens(config: Config) -> None:
    """Raises UserError if a policy of another run reads or writes other tokens."""
    if not config.evaluate.compare_with:
        return
    initial = initial_policy(config)
    own = _tokens_of(initial, initial, config.model)
    for name, folder in run_folders(config).items():
        policy, base = find_policy(folder, config)
        if _tokens_of(policy, base, config.model) != own:
            raise UserError(
                f"{KEY}: {name} has another tokenizer, chat template or number of embeddings: its "
                "policy would read these prompts wrongly"
            )


class _Tokens(NamedTuple):
    """What turns texts into tokens."""

    vocabulary: dict[str, int]
    template: Any
    num_embeddings: int | None


def _tokens_of(policy: Path, base: Path, model: ModelConfig) -> _Tokens:
    from madpo_ray.models.loading import load_tokenizer

    tokenizer = load_tokenizer(policy, model)
    template = tokenizer.chat_template
    return _Tokens(tokenizer.get_vocab(), template, count_embeddings(base))
