"""What ASHA saves in a search, and what Ray Tune costs per trial.

A random Llama learns which of two texts has the kinder words, from labels that are wrong one time
in five; margins come with the data. The same search of 12 trials runs with ASHA and without, then
the config's own training runs by itself. The last line is one JSON object.
"""

import argparse
import json
import math
import random
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmark_training import make_model

from madpo_ray import pipeline
from madpo_ray.cluster.connection import connected
from madpo_ray.config import Config, parse_config, with_changes
from madpo_ray.stages import margins, train, tune

SIZE = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
}
KIND = [f"w{number}" for number in range(100, 140)]
UNKIND = [f"w{number}" for number in range(200, 240)]
WRONG_LABELS = 0.2
EVALUATIONS = 8


def write_pairs(file: Path, count: int, seed: int) -> None:
    rng = random.Random(seed)
    with file.open("w") as stream:
        for _ in range(count):
            prompt = " ".join(f"w{rng.randrange(300, 2000)}" for _ in range(rng.randint(10, 30)))
            texts = [" " + " ".join(rng.choices(words, k=10)) for words in (KIND, UNKIND)]
            is_right = rng.random() > WRONG_LABELS
            chosen, rejected = texts if is_right else texts[::-1]
            margin = (2.0 if is_right else -2.0) + rng.gauss(0, 1)
            pair = {"prompt": prompt, "chosen": chosen, "rejected": rejected, "true_margin": margin}
            stream.write(json.dumps(pair) + "\n")


def config_of(work: Path, name: str, trials: int, seed: int, **settings: Any) -> Config:
    return parse_config(
        {
            "model": {"model_name_or_path": str(work / "model")},
            "data": {
                "files": [str(work / "pairs.jsonl")],
                "validation_fraction": 0.2,
                "test_fraction": 0.0,
                "keep_columns": ["true_margin"],
            },
            "reward": {"source": "columns", "source_columns": ["true_margin"]},
            "margins": {"calibration": "none"},
            "run": {"name": name, "storage_path": str(work), "seed": seed},
            "cluster": {"num_workers": 1},
            "train": {"learning_rate": 3e-4, "global_batch_size": 16, "num_train_epochs": 2},
            "tune": {
                "num_samples": trials,
                "evaluations": EVALUATIONS,
                "max_concurrent_trials": 1,
                "search_space": {
                    "train.beta": {"type": "loguniform", "min": 0.01, "max": 1.0},
                    "train.learning_rate": {"type": "loguniform", "min": 1e-5, "max": 1e-2},
                    "train.c_max": {"type": "uniform", "min": 1.5, "max": 6.0},
                    "train.c_min": {"type": "reciprocal", "of": "train.c_max"},
                },
                **settings,
            },
        }
    )


def run_search(config: Config) -> dict[str, float]:
    with connected(config.cluster, actors=config.actors, dashboard=True):
        pipeline.run_all(config, say=print, until=margins.STAGE)
        began = time.monotonic()
        pipeline.run_stage(config, tune.STAGE, say=print)
        seconds = time.monotonic() - began
    found = tune.STAGE.require(config)
    return {
        "seconds": seconds,
        "steps": found["steps"],
        "stopped": found["stopped"],
        "best": found["best"]["mean"],
    }


def run_training(config: Config) -> float:
    """Seconds of the config's own training, with the evaluations and saves of a trial."""
    with connected(config.cluster, actors=config.actors):
        pipeline.run_all(config, say=print, until=margins.STAGE)
        began = time.monotonic()
        pipeline.run_stage(config, train.STAGE, say=print)
        return time.monotonic() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=12)
    parser.add_argument("--pairs", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    trials, seed = arguments.trials, arguments.seed

    work = Path(tempfile.mkdtemp())
    try:
        make_model(work / "model", seed, **SIZE)
        write_pairs(work / "pairs.jsonl", arguments.pairs, seed)
        results: dict[str, float] = {}
        for scheduler in ("asha", "none"):
            config = config_of(work, scheduler, trials, seed, scheduler=scheduler)
            found = run_search(config)
            results |= {f"{scheduler}_{name}": value for name, value in found.items()}
        steps = results["none_steps"] // trials
        interval = math.ceil(steps / EVALUATIONS)  # as trials do
        every = {"eval_steps": interval, "save_steps": interval}
        config = config_of(work, "single", trials, seed)
        single = run_training(
            config.model_copy(update={"train": with_changes(config.train, "train", every)})
        )
    finally:
        shutil.rmtree(work)
    results["asha_saved"] = 1 - results["asha_steps"] / results["none_steps"]
    results["training_s"] = single
    results["overhead_per_trial_s"] = results["none_seconds"] / trials - single
    print(json.dumps({name: round(value, 3) for name, value in results.items()}))


if __name__ == "__main__":
    main()
