"""The paper's experiment in small: does MADPO help, and where?

Sentiment generation, as in the paper: prompts are the first words of movie-review sentences, the
initial policy is fine-tuned on the sentences, and the ground truth is `ground_truth.py`. Two
responses to a prompt become a pair; its label is drawn by Gumbel noise on their true rewards, so
that the truth is a Bradley-Terry model. Tier high: both responses are sampled; low: the better of
two samples against the human text; medium: half of each.

All methods train on the same pairs, for the same steps, from the same initial policy. MADPO runs on
margins of a reward model that has seen the pairs, as in the paper; on cross-fitted ones; and on
cross-fitted and calibrated ones. Unlike the paper: the model, fewer pairs, a higher learning rate
for all, no dropout, and rewards in units of human ratings. Every tier and seed has a JSON file of
results; a second call does what is left.
"""

import argparse
import json
import math
import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ground_truth
import numpy as np
import pyarrow as pa
from prepare_demo import read_sentences
from run_demo import copy_run

from madpo_ray import pipeline
from madpo_ray.artifacts.manifest import read_manifest
from madpo_ray.artifacts.tables import read_columns, read_split
from madpo_ray.atomic import write_json, write_text
from madpo_ray.cli import exit_codes, say
from madpo_ray.cluster import connected
from madpo_ray.columns import GROUP, MARGIN, SPLIT, TEXT_COLUMNS, TRAIN
from madpo_ray.config import Config, PolicyConfig, parse_config, with_changes
from madpo_ray.data.messages import from_text
from madpo_ray.errors import UserError
from madpo_ray.evaluation.sample_sets import PolicyFiles, SampleSet
from madpo_ray.evaluation.sampling import sample_responses
from madpo_ray.models.loading import load_tokenizer
from madpo_ray.models.source import base_model
from madpo_ray.passes import BatchNotes
from madpo_ray.scoring.report import describe_weights
from madpo_ray.stages import evaluate, margins, sft, train
from madpo_ray.stages.margins_report import weights_of

TIERS = ("high", "medium", "low")
PROMPT_WORDS = 4
MIN_WORDS = 8
MAX_WORDS = 30
MAX_NEW_TOKENS = 24
TEST_PROMPTS = 200

# Where margins come from: the reward model's folds, and its calibration. `weighted` has the weights
# of `seen` as columns, for the ablation.
MARGINS: dict[str, dict[str, dict[str, Any]]] = {
    "seen": {"reward": {"folds": 1}, "margins": {"calibration": "none"}},
    "weighted": {"margins": {"with_rewards": False}},
    "folds": {"reward": {"folds": 2}, "margins": {"calibration": "none"}},
    "calibrated": {"reward": {"folds": 2}, "margins": {"calibration": "temperature"}},
}
ABLATIONS = ("amplify_only", "dampen_only")
# A method: its margins, and its keys of section train. beta is 0.1 for all, as in the paper.
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "dpo": ("seen", {"loss_type": "sigmoid"}),
    "ipo": ("seen", {"loss_type": "ipo_sum"}),
    "beta_dpo": ("seen", {"loss_type": "beta_dpo", "beta_dpo_variant": "madpo_paper"}),
    "madpo": ("seen", {"loss_type": "madpo"}),
    "madpo_folds": ("folds", {"loss_type": "madpo"}),
    "madpo_calibrated": ("calibrated", {"loss_type": "madpo"}),
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
    "logging_steps": 4,
}


def base_config(arguments: argparse.Namespace, folder: Path, seed: int) -> dict[str, Any]:
    """What all runs of a tier and a seed have in common."""
    policy = {
        **LORA,
        "learning_rate": arguments.learning_rate,
        "num_train_epochs": arguments.epochs,
    }
    return {
        "model": {"model_name_or_path": str(arguments.model)},
        "data": {"files": [str(folder / "pairs.jsonl")], "max_length": 96},
        "run": {"storage_path": str(folder), "seed": seed},
        "cluster": {"num_workers": 2},
        "reward": {**LORA, "learning_rate": 5e-4, "num_train_epochs": 2},
        "margins": {"with_rewards": True},
        "train": {**policy, "beta": 0.1, **WEIGHTING},
        "evaluate": {
            "judge": "ground_truth:reward",
            "num_samples": 2 * TEST_PROMPTS,
            "max_new_tokens": MAX_NEW_TOKENS,
            "generation_batch_size": 50,
        },
    }


def changed(raw: dict[str, Any], name: str, *sections: dict[str, dict[str, Any]]) -> Config:
    """The config of a run with some keys replaced."""
    merged = {key: dict(value) for key, value in raw.items()}
    for changes in sections:
        for section, values in changes.items():
            merged.setdefault(section, {}).update(values)
    merged["run"]["name"] = name
    return parse_config(merged)


def fine_tune(arguments: argparse.Namespace, texts: list[str]) -> Path:
    """The initial policy, fine-tuned on the sentences; the same for all tiers and seeds."""
    folder = arguments.storage / "sft"
    raw = base_config(arguments, folder, seed=0)
    folder.mkdir(parents=True, exist_ok=True)
    others = random.Random(0).sample(texts, len(texts))
    rows = [
        {"prompt": prompt, "chosen": rest, "rejected": split_text(other)[1] + " ..."}
        for (prompt, rest), other in zip(map(split_text, texts), others, strict=True)
    ]
    write_rows(folder / "pairs.jsonl", rows)
    section = {**LORA, "learning_rate": 2e-4, "num_train_epochs": 1}
    config = changed(raw, "run", {"sft": section, "train": {"loss_type": "sigmoid"}})
    pipeline.run_all(config, say=say, until=sft.STAGE)
    return sft.STAGE.model(config)


def split_text(text: str) -> tuple[str, str]:
    """The prompt, and the rest with the space before it."""
    words = text.split(" ")
    return " ".join(words[:PROMPT_WORDS]), " " + " ".join(words[PROMPT_WORDS:])


def write_rows(file: Path, rows: list[dict[str, Any]]) -> None:
    write_text(file, "".join(json.dumps(row) + "\n" for row in rows))


def make_pairs(
    arguments: argparse.Namespace,
    policy: Path,
    folder: Path,
    tier: str,
    seed: int,
    texts: list[str],
) -> None:
    """Writes `pairs.jsonl`: two responses to each prompt, labelled by the noisy ground truth."""
    config = changed(base_config(arguments, folder, seed), "sampling", model_of(policy))
    rng = random.Random(f"{tier} {seed}")
    count = arguments.pairs + arguments.pairs // 5 + TEST_PROMPTS
    chosen_texts = distinct(rng.sample(texts, len(texts)))[:count]
    prompts = [split_text(text)[0] for text in chosen_texts]
    tokenizer = load_tokenizer(base_model(config.model, config.run), config.model)
    table = pa.table({"prompt_ids": tokenizer(prompts * 2)["input_ids"]})
    sampled = sample_responses(
        table,
        config.actors,
        batch_size=50,
        notes=BatchNotes(folder / "in-progress"),
        model=config.model,
        policies={"sft": PolicyFiles(policy, policy)},
        temperatures=[1.0],
        max_new_tokens=MAX_NEW_TOKENS,
        seed=seed,
    )
    responses = sampled[SampleSet("sft", 1.0).text].to_pylist()
    rewards = ground_truth.reward(prompts * 2, responses)

    rows = []
    for i, (prompt, text) in enumerate(zip(prompts, chosen_texts, strict=True)):
        pair = [(responses[j], rewards[j]) for j in (i, i + len(prompts))]
        if tier == "low" or (tier == "medium" and i % 2):
            human = split_text(text)[1]
            pair = [
                max(pair, key=lambda one: one[1]),
                (human, ground_truth.reward([prompt], [human])[0]),
            ]
        if pair[0][0].strip() and pair[1][0].strip() and pair[0][0] != pair[1][0]:
            rows.append(labelled(prompt, pair, rng) | {"split": split_name(i, arguments.pairs)})
    write_rows(folder / "pairs.jsonl", rows)


def distinct(texts: list[str]) -> list[str]:
    """Texts with different prompts."""
    return list({split_text(text)[0]: text for text in texts}.values())


def split_name(place: int, num_train: int) -> str:
    if place < num_train:
        return "train"
    return "validation" if place < num_train + num_train // 5 else "test"


def labelled(prompt: str, pair: list[tuple[str, float]], rng: random.Random) -> dict[str, Any]:
    """A pair whose label follows the Bradley-Terry model of the true rewards."""
    noisy = [reward - math.log(-math.log(rng.random())) for _, reward in pair]
    first = noisy[0] > noisy[1]
    (chosen, chosen_reward), (rejected, rejected_reward) = pair if first else pair[::-1]
    return {
        "prompt": prompt,
        "chosen": chosen,
        "rejected": rejected,
        "true_chosen": chosen_reward,
        "true_rejected": rejected_reward,
    }


def model_of(policy: Path) -> dict[str, dict[str, Any]]:
    return {"model": {"model_name_or_path": str(policy)}}


TRUE_SCORES: dict[str, dict[str, Any]] = {
    "data": {"split_column": "split", "keep_columns": ["true_chosen", "true_rejected"]},
    "evaluate": {"chosen_score_column": "true_chosen", "rejected_score_column": "true_rejected"},
}


def run_tier(
    arguments: argparse.Namespace, policy: Path, tier: str, seed: int, texts: list[str]
) -> None:
    """All methods on the pairs of a tier and a seed."""
    folder = arguments.storage / f"{tier}-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    require_same_arguments(folder / "arguments.json", arguments)
    if not (folder / "pairs.jsonl").exists():
        make_pairs(arguments, policy, folder, tier, seed, texts)
    raw = base_config(arguments, folder, seed)
    if tier == "high":
        raw["evaluate"]["temperatures"] = arguments.temperatures
    sections = [model_of(policy), TRUE_SCORES]

    trained = run_methods(raw, sections, folder, arguments.methods)
    write_json(folder / "result.json", summary(trained))


def require_same_arguments(file: Path, arguments: argparse.Namespace) -> None:
    """Refuses to add to results that other arguments made, apart from which of them to make."""
    given = vars(arguments).items()
    now = {name: str(value) for name, value in given if name not in UNCOMPARED}
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
        if not train.STAGE.exists(config):
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
    config = changed(raw, f"margins-{kind}", *own)
    # Reward models and the reference pass are those of `folds`.
    if kind == "calibrated" and "folds" in scored and not margins.STAGE.exists(config):
        copy_run(scored["folds"].run.folder, config.run.folder)
    pipeline.run_all(config, say=say, until=margins.STAGE)
    scored[kind] = config
    return config


def weighted_data(seen: Config, folder: Path) -> dict[str, Any]:
    """Section data of the pairs with the weights of the ablations."""
    file = folder / "weighted.jsonl"
    if not file.exists():
        write_weighted(seen, file)
    return {"data": {"files": [str(file)], "keep_columns": [*seen.data.keep_columns, *ABLATIONS]}}


def write_weighted(scored: Config, file: Path) -> None:
    """The scored pairs with the weights of both ablations."""
    names = [*TEXT_COLUMNS, SPLIT, GROUP, MARGIN, *scored.data.keep_columns]
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


def summary(trained: list[Config]) -> dict[str, Any]:
    """The numbers of all methods, with samples of all for the same prompts."""
    first, *others = trained
    folders = [str(config.run.folder) for config in others]
    compared = first.model_copy(
        update={"evaluate": first.evaluate.model_copy(update={"compare_with": tuple(folders)})}
    )
    pipeline.run_all(compared, say=say, until=evaluate.STAGE)
    evaluation = json.loads((evaluate.STAGE.folder(compared) / "evaluation.json").read_text())
    return {
        "methods": [config.run.name for config in trained],
        "sampling": evaluation["sampling"],
        "comparisons": evaluation["comparisons"],
        "runs": {config.run.name: describe_run(config) for config in trained},
    }


def describe_run(config: Config) -> dict[str, Any]:
    """The training's last evaluation, its weights, and the seconds of each stage."""
    found: dict[str, Any] = {"final": train.STAGE.require(config), "seconds": {}}
    for stage in pipeline.wanted_stages(config, train.STAGE):
        manifest = read_manifest(stage.folder(config))
        assert manifest is not None
        found["seconds"][stage.name] = manifest["seconds"]
    if config.train.loss_type == "madpo":
        rows = read_split(margins.STAGE.rows(config), TRAIN, [MARGIN])[MARGIN].to_numpy()
        weights = weights_of(rows, config.train)
        found["negative_fraction"] = float(np.mean(rows < 0))
        found["weight"] = describe_weights(weights)
    return found


def print_table(storage: Path) -> None:
    """Mean ground-truth reward of samples at temperature 1, over the seeds of each tier."""
    found: dict[tuple[str, str], list[float]] = {}
    for file in sorted(storage.glob("*-*/result.json")):
        tier = file.parent.name.rpartition("-")[0]
        result = json.loads(file.read_text())
        for entry in result["sampling"]:
            if entry["temperature"] == 1.0:
                name = entry["policy"]
                name = result["methods"][0] if name == "policy" else name
                found.setdefault((name, tier), []).append(entry["reward"]["mean"])
    for (name, tier), rewards in found.items():
        say(f"{tier:7} {name:18} {mean_with_error(rewards)} over {len(rewards)} seeds")


def mean_with_error(values: Sequence[float]) -> str:
    """The mean, and its standard error if there are several values."""
    error = np.std(values, ddof=1) / len(values) ** 0.5 if len(values) > 1 else math.nan
    return f"{np.mean(values):.3f} ± {error:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=Path(".demo/SmolLM2-135M-Instruct.Q4_1.gguf"))
    parser.add_argument("--sdist", type=Path, default=Path(".demo/vaderSentiment-3.3.2.tar.gz"))
    parser.add_argument("--storage", type=Path, default=Path("runs/paper"))
    parser.add_argument("--pairs", type=int, default=1000, help="training pairs")
    parser.add_argument("--epochs", type=int, default=2, help="of the policies")
    parser.add_argument("--learning-rate", type=float, default=2e-4, help="of the policies")
    parser.add_argument("--seeds", type=int, default=3, help="of tier high; 1 of the others")
    parser.add_argument("--sentences", type=int, default=3000, help="that the SFT sees")
    parser.add_argument("--tiers", nargs="+", choices=TIERS, default=list(TIERS))
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--temperatures", nargs="+", type=float, default=[1.0, 0.7, 0.0])
    arguments = parser.parse_args()
    arguments.storage = arguments.storage.absolute()

    # The ground truth.
    sentences = read_sentences(arguments.sdist, MAX_WORDS)
    arguments.storage.mkdir(parents=True, exist_ok=True)
    file = arguments.storage / "ground-truth.npy"
    os.environ[ground_truth.FILE_VARIABLE] = str(file)
    if not file.exists():
        ratings = [one.mean_rating for one in sentences]
        quality = ground_truth.fit([one.text for one in sentences], ratings, file, seed=0)
        write_json(arguments.storage / "ground-truth.json", quality)
        say(f"ground truth: {quality}")

    texts = [one.text for one in sentences if len(one.text.split(" ")) >= MIN_WORDS]
    for_sft = random.Random(0).sample(texts, min(arguments.sentences, len(texts)))
    with exit_codes():
        any_config = changed(base_config(arguments, arguments.storage, 0), "any")
        with connected(any_config.cluster, actors=any_config.actors):
            policy = fine_tune(arguments, for_sft)
            for tier in arguments.tiers:
                for seed in range(arguments.seeds if tier == "high" else 1):
                    run_tier(arguments, policy, tier, seed, texts)
        print_table(arguments.storage)


if __name__ == "__main__":
    main()
