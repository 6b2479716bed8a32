"""Samples of a run's policies and of other runs', and their rewards."""

import hashlib
import json
import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import feather

from madpo_ray import columns
from madpo_ray.artifacts.tables import read_split
from madpo_ray.atomic import replace_file
from madpo_ray.config import Config
from madpo_ray.data.messages import from_text
from madpo_ray.errors import UserError
from madpo_ray.models.limits import check_lengths
from madpo_ray.models.source import find_base_model
from madpo_ray.passes import BatchNotes
from madpo_ray.stages import margins, pairs, train
from madpo_ray.stages.judge_source import JudgeSource
from madpo_ray.stages.other_runs import find_policy, run_folders, runs_content
from madpo_ray.stages.sft import initial_policy
from madpo_ray.stages.stage import KEPT, Build

if TYPE_CHECKING:
    from madpo_ray.evaluation.sample_sets import PolicyFiles, SampleSet
    from madpo_ray.scoring.scorers import Scorer

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


def judge_of(config: Config) -> JudgeSource | None:
    """What rewards samples."""
    evaluated = config.evaluate
    if evaluated.judge is None:
        return None
    return JudgeSource(evaluated.judge, evaluated.judge_revision, key="evaluate.judge")


def sample_scorers(
    config: Config, sets: Sequence["SampleSet"], policies: Mapping[str, "PolicyFiles"]
) -> list["Scorer"]:
    """What gives numbers to samples: their divergence and, if there is a judge, their reward."""
    from madpo_ray.evaluation.divergence import DivergenceScorer
    from madpo_ray.evaluation.judged import JudgedSamples
    from madpo_ray.evaluation.sample_sets import REFERENCE

    forward = config.scoring.forward
    scorers: list[Scorer] = [
        DivergenceScorer(sets, policies, policies[REFERENCE], config.model, forward=forward)
    ]
    judge = judge_of(config)
    if judge is not None:
        scorers.append(JudgedSamples(sets, judge.scorer(forward)))
    return scorers


def require_judge(config: Config) -> JudgeSource:
    """The judge of a search for rewards. Raises UserError if there is none that can be used."""
    judge = judge_of(config)
    if judge is None:
        raise UserError(f"tune.objective: {config.tune.objective} needs evaluate.judge")
    judge.check()
    return judge


def check_prompts(config: Config, judge: JudgeSource | None, split: str) -> None:
    """Raises UserError if model or judge cannot read samples of a split's prompts."""
    length = columns.LENGTHS[columns.PROMPT_IDS]
    found = read_split(pairs.STAGE.rows(config), split, (columns.PROMPT, length))
    longest = pc.max(found[length]).as_py()
    folder = find_base_model(config.model, config.run)
    if folder is not None:
        check_lengths(
            folder,
            longest + config.evaluate.max_new_tokens,
            key="evaluate.max_new_tokens",
            before=longest,
        )
    if judge is not None:
        judge.check_reads(from_text(found[columns.PROMPT][0].as_py()))


def measure_rewards(config: Config, policy: "PolicyFiles", notes: BatchNotes) -> dict[str, float]:
    """Mean reward of a policy's samples for validation prompts, and their divergence."""
    from madpo_ray.evaluation.comparisons import by_prompt
    from madpo_ray.evaluation.divergence import describe_divergence
    from madpo_ray.evaluation.sample_sets import POLICY, REFERENCE, PolicyFiles, SampleSet
    from madpo_ray.scoring.actors import score_table

    initial = initial_policy(config)
    samples = SampleSet(POLICY, config.tune.temperature)
    policies = {POLICY: policy}
    table = _sample(config, policies, columns.VALIDATION, (samples.temperature,), notes)
    num_prompts = table.num_rows // SAMPLES_PER_PROMPT
    scorers = sample_scorers(
        config, [samples], policies | {REFERENCE: PolicyFiles(initial, initial)}
    )
    batch_size = config.scoring.batch_size
    scored = score_table(table, scorers, config.actors, batch_size=batch_size, notes=notes)
    rewards = by_prompt(scored[samples.reward], num_prompts)
    divergence = describe_divergence(scored, samples, num_prompts)
    return {"reward": float(rewards.mean()), "kl": float(divergence["kl"])}


def _prompts(config: Config, split: str) -> pa.Table:
    """Different prompts of a split drawn at random: all once, then all again."""
    names = (columns.PAIR_ID, columns.PROMPT, columns.PROMPT_IDS)
    found = read_split(margins.STAGE.rows(config), split, names)
    row_of = {tuple(ids): row for row, ids in enumerate(found[columns.PROMPT_IDS].to_pylist())}
    rows = list(row_of.values())
    count = math.ceil(config.evaluate.num_samples / SAMPLES_PER_PROMPT)
    drawn = random.Random(config.run.seed).sample(rows, min(count, len(rows)))
    prompts = found.take(drawn * SAMPLES_PER_PROMPT)
    # Actors note what they work on by pair_id: each sample needs its own.
    ids = prompts[columns.PAIR_ID].to_pylist()
    unique = [f"{pair_id}/{row // len(drawn)}" for row, pair_id in enumerate(ids)]
    return prompts.set_column(0, columns.PAIR_ID, pa.array(unique))


def draw_samples(policies: dict[str, "PolicyFiles"], build: Build) -> pa.Table:
    """Samples of all policies. They are kept until the stage is finished: a judge may fail."""
    config = build.config
    kept = _kept_samples(config)
    if kept.exists():
        return feather.read_table(kept)
    temperatures = config.evaluate.temperatures
    table = _sample(config, policies, columns.TEST, temperatures, build.notes)
    kept.parent.mkdir(parents=True, exist_ok=True)
    partial = kept.with_suffix(".partial")
    feather.write_feather(table, partial)
    replace_file(partial, kept)
    return table


def _sample(
    config: Config,
    policies: Mapping[str, "PolicyFiles"],
    split: str,
    temperatures: Sequence[float],
    notes: BatchNotes,
) -> pa.Table:
    """Samples of policies for prompts of a split."""
    from madpo_ray.evaluation.sampling import sample_responses

    return sample_responses(
        _prompts(config, split),
        config.actors,
        batch_size=config.evaluate.generation_batch_size,
        notes=notes,
        model=config.model,
        policies=policies,
        temperatures=temperatures,
        max_new_tokens=config.evaluate.max_new_tokens,
        seed=config.run.seed,
        over_gpus=config.scoring.over_gpus,
    )


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
