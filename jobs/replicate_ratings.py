"""MADPO without generation: labels of single human raters, and how robust the weights are.

A pair is two sentences of movie reviews, labelled by one rater drawn for each, as in the demo; the
true margin is the difference of their mean ratings. All methods of `paper_methods.py` train on
the same pairs. Then MADPO trains on margins with noise of growing size added. Measured on test
pairs: how well the policy's implicit reward follows the true margin, and how often it agrees with
the label. Every result is a JSON file in the folder of its seed; a second call does what is left.
"""

import argparse
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from paper_methods import (
    LORA,
    MARGINS,
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
from prepare_demo import build_pairs, read_sentences

from madpo_ray import pipeline
from madpo_ray.artifacts.tables import read_columns
from madpo_ray.atomic import write_json
from madpo_ray.cli import exit_codes, say
from madpo_ray.cluster.connection import connected
from madpo_ray.columns import MARGIN, TEXT_COLUMNS
from madpo_ray.config import Config
from madpo_ray.data.messages import from_text
from madpo_ray.stages import evaluate, margins

MAX_WORDS = 16
SIZES = {"validation": 200, "test": 500}
# Differences of ratings are no log-odds: MADPO on the true margins would mean nothing.
OWN_METHODS = [name for name in METHODS if name != "madpo_true"]
NOISY = "noisy_margin"
NOISES = (1.0, 2.0, 4.0)  # standard deviations, in those of the margins


def base_config(arguments: argparse.Namespace, folder: Path, seed: int) -> dict[str, Any]:
    rates = {"learning_rate": arguments.learning_rate, "num_train_epochs": arguments.epochs}
    return {
        "model": {
            "model_name_or_path": str(arguments.model),
            "chat_template_path": "jobs/configs/chatml.jinja",
        },
        "data": {
            "files": [str(folder / "pairs.jsonl")],
            "split_column": "split",
            "group_column": "group",
            "max_length": 64,
            "keep_columns": ["chosen_rating", "rejected_rating"],
        },
        "run": {"storage_path": str(folder), "seed": seed},
        "cluster": {"num_workers": 2},
        "reward": REWARD,
        "margins": {"with_rewards": True},
        "train": {**LORA, **rates, "beta": 0.1, **WEIGHTING},
        "evaluate": {
            "chosen_score_column": "chosen_rating",
            "rejected_score_column": "rejected_rating",
            "num_samples": 2,
            "max_new_tokens": 8,
        },
    }


def run_seed(arguments: argparse.Namespace, seed: int) -> None:
    folder = arguments.storage / f"ratings-{seed}"
    sentences = read_sentences(arguments.sdist, MAX_WORDS)
    rows = build_pairs(sentences, {"train": arguments.pairs, **SIZES}, seed)
    folder.mkdir(parents=True, exist_ok=True)
    constants = {"sizes": SIZES, "reward": REWARD, "weighting": WEIGHTING}
    require_same_arguments(folder / "arguments.json", arguments, constants)
    if not (folder / "pairs.jsonl").exists():
        write_rows(folder / "pairs.jsonl", rows)
    raw = base_config(arguments, folder, seed)

    # The methods, each on its margins.
    for config in run_methods(raw, [], folder, arguments.methods):
        measure(config, folder / f"{config.run.name}.json")

    # MADPO on margins with noise, which come as a column of the data.
    scored = changed(raw, "margins-calibrated", MARGINS["calibrated"])
    if arguments.noises:
        pipeline.run_all(scored, say=say, until=margins.STAGE)
    for noise in arguments.noises:
        file = folder / f"noise-{noise:g}.jsonl"
        write_noisy(scored, noise, seed, file)  # again: other settings give other margins
        keys: dict[str, dict[str, Any]] = {
            "data": {"files": [str(file)], "keep_columns": [*raw["data"]["keep_columns"], NOISY]},
            "reward": {"source": "columns", "source_columns": [NOISY]},
            "margins": {"calibration": "none"},
        }
        measure(changed(raw, f"noise-{noise:g}", keys), folder / f"noise-{noise:g}.json")


def write_noisy(scored: Config, noise: float, seed: int, file: Path) -> None:
    """The scored pairs with their margins, plus noise. Only training pairs' margins are used."""
    names = [*TEXT_COLUMNS, "split", "group", "chosen_rating", "rejected_rating", MARGIN]
    table = read_columns(margins.STAGE.rows(scored), names)
    drawn = np.random.default_rng(seed).normal(0, np.std(table[MARGIN]), table.num_rows)
    rows = table.to_pylist()
    for row, value in zip(rows, drawn, strict=True):
        row[NOISY] = row.pop(MARGIN) + noise * value
        for name in TEXT_COLUMNS:
            row[name] = from_text(row[name])
    write_rows(file, rows)


def measure(config: Config, result: Path) -> None:
    """Writes what the policy of a method makes of the test pairs."""
    pipeline.run_all(config, say=say, until=evaluate.STAGE)
    evaluation = json.loads((evaluate.STAGE.folder(config) / "evaluation.json").read_text())
    write_json(result, {"implicit": evaluation["implicit"], **describe_run(config)})


def print_table(storage: Path) -> None:
    """Mean over seeds, with the standard error."""
    found: dict[str, list[tuple[float, float]]] = {}
    for file in sorted(storage.glob("ratings-*/*.json")):
        result = json.loads(file.read_text())
        if "implicit" in result:
            implicit = result["implicit"]
            numbers = (implicit["rank_correlation"], implicit["accuracy"])
            found.setdefault(file.stem, []).append(numbers)
    say("method: rank correlation with the true margin, accuracy on noisy labels")
    for name, seeds in found.items():
        cells = "  ".join(map(mean_with_error, zip(*seeds, strict=True)))
        say(f"{name:18} {cells}  over {len(seeds)} seeds")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=Path(".demo/SmolLM2-135M-Instruct.Q4_1.gguf"))
    parser.add_argument("--sdist", type=Path, default=Path(".demo/vaderSentiment-3.3.2.tar.gz"))
    parser.add_argument("--storage", type=Path, default=Path("runs/paper"))
    parser.add_argument("--pairs", type=int, default=1000, help="training pairs")
    parser.add_argument("--epochs", type=int, default=1, help="of the policies")
    parser.add_argument("--learning-rate", type=float, default=5e-4, help="of the policies")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--methods", nargs="*", choices=OWN_METHODS, default=OWN_METHODS)
    parser.add_argument("--noises", nargs="*", type=float, default=list(NOISES))
    arguments = parser.parse_args()
    arguments.storage = Path(os.path.abspath(arguments.storage))

    with exit_codes():
        any_config = changed(base_config(arguments, arguments.storage, 0), "any")
        with connected(any_config.cluster, actors=any_config.actors):
            for seed in range(arguments.seeds):
                run_seed(arguments, seed)
        print_table(arguments.storage)


if __name__ == "__main__":
    main()
