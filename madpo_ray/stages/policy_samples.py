"""Samples of a run's policies and of other runs', for stage evaluate."""

import hashlib
import json
import math
import random
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
from pyarrow import feather

from madpo_ray import columns
from madpo_ray.artifacts.tables import read_split
from madpo_ray.atomic import replace_file
from madpo_ray.config import Config
from madpo_ray.stages import margins, train
from madpo_ray.stages.other_runs import find_policy, run_folders, runs_content
from madpo_ray.stages.sft import initial_policy
from madpo_ray.stages.stage import KEPT, Build

if TYPE_CHECKING:
    from madpo_ray.evaluation.sample_sets import PolicyFiles

# Torch and Ray Data are imported inside functions: they take seconds, and neither `--help` nor a
# wrong config should wait.

SAMPLES_PER_PROMPT = 2


def policies_of(config: Config) -> dict[str, "PolicyFiles"]:
    """Whose samples are compared, by name."""
    from madpo_ray.evaluation.sample_sets import POLICY, REFERENCE, PolicyFiles

    initial = initial_policy(config)
    own = {
        POLICY: PolicyFiles(train.STAGE.model(config), initial),
        REFERENCE: PolicyFiles(initial, initial),
    }
    others = {name: find_policy(folder, config) for name, folder in run_folders(config).items()}
    return own | others


def _prompts(config: Config) -> pa.Table:
    """Different prompts of the test split drawn at random: all once, then all again."""
    names = (columns.PAIR_ID, columns.PROMPT, columns.PROMPT_IDS)
    test = read_split(margins.STAGE.rows(config), columns.TEST, names)
    row_of = {tuple(ids): row for row, ids in enumerate(test[columns.PROMPT_IDS].to_pylist())}
    rows = list(row_of.values())
    count = math.ceil(config.evaluate.num_samples / SAMPLES_PER_PROMPT)
    drawn = random.Random(config.run.seed).sample(rows, min(count, len(rows)))
    prompts = test.take(drawn * SAMPLES_PER_PROMPT)
    # Actors note what they work on by pair_id: each sample needs its own.
    ids = prompts[columns.PAIR_ID].to_pylist()
    unique = [f"{pair_id}/{row // len(drawn)}" for row, pair_id in enumerate(ids)]
    return prompts.set_column(0, columns.PAIR_ID, pa.array(unique))


def draw_samples(policies: dict[str, "PolicyFiles"], build: Build) -> pa.Table:
    """Samples of all policies. They are kept until the stage is finished: a judge may fail."""
    from madpo_ray.evaluation.sampling import sample_responses

    config = build.config
    kept = _kept_samples(config)
    if kept.exists():
        return feather.read_table(kept)
    table = sample_responses(
        _prompts(config),
        config.actors,
        batch_size=config.evaluate.generation_batch_size,
        notes=build.notes,
        model=config.model,
        policies=policies,
        temperatures=config.evaluate.temperatures,
        max_new_tokens=config.evaluate.max_new_tokens,
        seed=config.run.seed,
    )
    kept.parent.mkdir(parents=True, exist_ok=True)
    partial = kept.with_suffix(".partial")
    feather.write_feather(table, partial)
    replace_file(partial, kept)
    return table


def _kept_samples(config: Config) -> Path:
    """Where samples are kept: they do not depend on the judge."""
    keys = {"temperatures", "num_samples", "max_new_tokens", "generation_batch_size"}
    parts = {
        "seed": config.run.seed,
        "evaluate": config.evaluate.model_dump(mode="json", include=keys),
        "train": train.STAGE.inputs(config).fingerprint,
        "runs": runs_content(config),
    }
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
    return config.run.ray_folder / f"evaluate-{digest[:16]}" / KEPT / "samples.arrow"
