"""The paper's experiment in small: does MADPO help, and where?

Sentiment generation, as in the paper: prompts are the first words of movie-review sentences, the
initial policy is fine-tuned on the sentences, and the ground truth is `ground_truth.py`. Two
responses to a prompt become a pair; its label is drawn by Gumbel noise on their true rewards, so
that the truth is a Bradley-Terry model. Tier high: both responses are sampled; low: the better of
two samples against the human text; medium: half of each.

All methods train on the same pairs, for the same steps, from the same initial policy. MADPO runs on
margins of a reward model that has seen the pairs, as in the paper; on cross-fitted ones; and on
cross-fitted and calibrated ones. Unlike the paper: the model, fewer pairs, a higher learning rate
for all, no dropout, and rewards that come from human ratings. Every tier and seed has a JSON file
of results; a second call does what is left.
"""

import argparse
import json
import math
import os
import random
from pathlib import Path
from typing import Any

import ground_truth
import pyarrow as pa
from paper_methods import (
    LORA,
    METHODS,
    REWARD,
    WEIGHTING,
    changed,
    describe_run,
    mean_with_error,
    require_same_arguments,
    run_methods,
    write_rows,
)
from prepare_demo import Sentence, read_sentences

from madpo_ray import pipeline
from madpo_ray.artifacts.manifest import read_manifest
from madpo_ray.atomic import write_json
from madpo_ray.cli import exit_codes, say
from madpo_ray.cluster.connection import connected
from madpo_ray.config import Config
from madpo_ray.errors import UserError
from madpo_ray.evaluation.sample_sets import PolicyFiles, SampleSet
from madpo_ray.evaluation.sampling import sample_responses
from madpo_ray.models.loading import load_tokenizer
from madpo_ray.models.source import base_model
from madpo_ray.passes import BatchNotes
from madpo_ray.stages import evaluate, sft, train

TIERS = ("high", "medium", "low")
PROMPT_WORDS = 4
MIN_WORDS = 8
MAX_WORDS = 20  # the rest has about as many tokens as a sample may have
MAX_NEW_TOKENS = 24
RATED_WORDS = 30  # of the sentences that the ground truth is fitted to
PAIRS_SEED = 1000  # of the samples in the pairs, plus the run's: a test draws others
TEST_PROMPTS = 200
TABLE_TEMPERATURE = 1.0


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
        "reward": REWARD,
        "margins": {"with_rewards": True},
        "train": {**policy, "beta": 0.1, **WEIGHTING},
        "evaluate": {
            "judge": "ground_truth:reward",
            "num_samples": 2 * TEST_PROMPTS,
            "max_new_tokens": MAX_NEW_TOKENS,
            "generation_batch_size": 50,
        },
    }


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
    chosen_texts = rng.sample(texts, count)
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
        seed=PAIRS_SEED + seed,
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
    if not (folder / "pairs.jsonl").exists():
        make_pairs(arguments, policy, folder, tier, seed, texts)
    raw = base_config(arguments, folder, seed)
    if tier == "high":
        raw["evaluate"]["temperatures"] = arguments.temperatures
    sections = [model_of(policy), TRUE_SCORES]

    # Also those of earlier calls: all are compared.
    wanted = [name for name in METHODS if name in arguments.methods or has_run(folder / name)]
    trained = run_methods(raw, sections, folder, wanted)
    write_json(folder / "result.json", summary(trained))


def has_run(run: Path) -> bool:
    return read_manifest(run / train.STAGE.name) is not None


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


def print_table(storage: Path) -> None:
    """Mean ground-truth reward and KL of samples, over the seeds of each tier."""
    found: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for file in sorted(storage.glob("*-*/result.json")):
        tier = file.parent.name.rpartition("-")[0]
        result = json.loads(file.read_text())
        for entry in result["sampling"]:
            if entry["temperature"] == TABLE_TEMPERATURE:
                name = entry["policy"]
                name = result["methods"][0] if name == "policy" else name
                numbers = (entry["reward"]["mean"], entry["kl"])
                found.setdefault((name, tier), []).append(numbers)
    say("tier, method: ground-truth reward, KL")
    for (name, tier), seeds in found.items():
        cells = "  ".join(map(mean_with_error, zip(*seeds, strict=True)))
        say(f"{tier:7} {name:18} {cells}  over {len(seeds)} seeds")


def divide(arguments: argparse.Namespace, texts: list[str]) -> tuple[list[str], list[str]]:
    """Texts for the fine-tuning, and others with different prompts for the pairs.

    Raises:
        UserError: too few are left for the pairs.
    """
    usable = [text for text in texts if MIN_WORDS <= len(text.split(" ")) <= MAX_WORDS]
    usable = random.Random(0).sample(usable, len(usable))
    for_sft, others = usable[: arguments.sentences], usable[arguments.sentences :]
    seen = {split_text(text)[0] for text in for_sft}
    others = [text for text in distinct(others) if split_text(text)[0] not in seen]
    needed = arguments.pairs + arguments.pairs // 5 + TEST_PROMPTS
    if len(others) < needed:
        raise UserError(f"{len(others)} prompts are left, and {needed} are needed: lower --pairs")
    return for_sft, others


def fit_ground_truth(storage: Path, sentences: list[Sentence]) -> None:
    """Fits what rewards texts, unless that was done, and lets the judge find it."""
    file = storage / "ground-truth.npy"
    os.environ[ground_truth.FILE_VARIABLE] = str(file)
    if file.exists():
        return
    ratings = [one.mean_rating for one in sentences]
    quality = ground_truth.fit([one.text for one in sentences], ratings, file, seed=0)
    say(f"ground truth: {quality}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=Path(".demo/SmolLM2-135M-Instruct.Q4_1.gguf"))
    parser.add_argument("--sdist", type=Path, default=Path(".demo/vaderSentiment-3.3.2.tar.gz"))
    parser.add_argument("--storage", type=Path, default=Path("runs/paper"))
    parser.add_argument("--pairs", type=int, default=1000, help="training pairs")
    parser.add_argument("--epochs", type=int, default=2, help="of the policies")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="of the policies")
    parser.add_argument("--seeds", type=int, default=3, help="of tier high; 1 of the others")
    parser.add_argument("--sentences", type=int, default=2500, help="for the SFT")
    parser.add_argument("--tiers", nargs="+", choices=TIERS, default=list(TIERS))
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--temperatures", nargs="+", type=float, default=[1.0, 0.7, 0.0])
    arguments = parser.parse_args()
    if TABLE_TEMPERATURE not in arguments.temperatures:
        parser.error(f"--temperatures must hold {TABLE_TEMPERATURE:g}, which the table is of")
    arguments.storage = arguments.storage.absolute()

    with exit_codes():
        sentences = read_sentences(arguments.sdist, RATED_WORDS)
        for_sft, others = divide(arguments, [one.text for one in sentences])
        constants = {
            "words": (PROMPT_WORDS, MIN_WORDS, MAX_WORDS, RATED_WORDS),
            "max_new_tokens": MAX_NEW_TOKENS,
            "ground_truth": (ground_truth.SCALE, ground_truth.PENALTY),
            "weighting": WEIGHTING,
        }
        arguments.storage.mkdir(parents=True, exist_ok=True)
        require_same_arguments(arguments.storage / "arguments.json", arguments, constants)
        fit_ground_truth(arguments.storage, sentences)
        any_config = changed(base_config(arguments, arguments.storage, 0), "any")
        with connected(any_config.cluster, actors=any_config.actors):
            policy = fine_tune(arguments, for_sft)
            for tier in arguments.tiers:
                for seed in range(arguments.seeds if tier == "high" else 1):
                    run_tier(arguments, policy, tier, seed, others)
        print_table(arguments.storage)


if __name__ == "__main__":
    main()
