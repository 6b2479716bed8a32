"""Stage evaluate: what the training did, on the test split."""

import inspect
import itertools
import math
import random
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from madpo_ray import columns
from madpo_ray.artifacts.hashes import hash_file
from madpo_ray.artifacts.tables import column_names, read_split
from madpo_ray.atomic import write_json
from madpo_ray.config import Config, ModelConfig, kind_of
from madpo_ray.errors import UserError
from madpo_ray.models.source import check_model, fetch_model, model_inputs
from madpo_ray.stages import margins, pairs, train
from madpo_ray.stages.other_runs import (
    check_runs,
    open_run,
    require_same_tokens,
    run_names,
    runs_content,
)
from madpo_ray.stages.sft import initial_policy, stages_before_policy
from madpo_ray.stages.stage import Build, Description, Stage

if TYPE_CHECKING:
    from madpo_ray.evaluation.divergence import PolicyFiles, Sampled
    from madpo_ray.scoring.judges import TextScorer
    from madpo_ray.scoring.scorers import Scorer

# Torch, Ray Data and scipy are imported inside functions: they take seconds, and neither
# `--help` nor a wrong config should wait.

SAMPLES_PER_PROMPT = 2
POLICY = "policy"
REFERENCE = "reference"


def _settings(config: Config) -> dict[str, Any]:
    return {"seed": config.run.seed, "evaluate": config.evaluate.fingerprinted()}


def _upstream(config: Config) -> tuple[Stage, ...]:
    return (*stages_before_policy(config), margins.STAGE, train.STAGE)


def _content(config: Config) -> dict[str, Any]:
    """Hashes of the judge and of the other runs' policies."""
    found = runs_content(config)
    judge = config.evaluate.judge
    if judge is not None and kind_of(judge) == "classifier":
        found["judge"] = model_inputs(_classifier(config), "SEQ_CLS").fingerprint
    elif judge is not None:
        from madpo_ray.scoring.judges import find_function

        file = inspect.getsourcefile(inspect.unwrap(find_function(judge, "evaluate.judge")))
        found["judge"] = hash_file(Path(file)) if file else None
    return found


def _check(config: Config) -> None:
    """Raises UserError if there are no pairs to evaluate on, as early as that is known, or a judge
    or another run is not there.
    """
    data = config.data
    is_empty = data.split_column is None and data.test_fraction == 0
    if pairs.STAGE.exists(config) and pairs.STAGE.is_finished(config):
        is_empty = pairs.STAGE.require(config)["pairs"][columns.TEST] == 0
    if is_empty:
        raise UserError(
            "split test has no pairs to evaluate on: set data.test_fraction or data.split_column"
        )

    judge = config.evaluate.judge
    if judge is not None and kind_of(judge) == "classifier":
        check_model(_classifier(config), "SEQ_CLS")
    elif judge is not None:
        from madpo_ray.scoring.judges import find_function

        find_function(judge, "evaluate.judge")
    check_runs(config)


def _classifier(config: Config) -> ModelConfig:
    """The judge, if it is a model."""
    judge = config.evaluate.judge
    assert judge is not None
    return ModelConfig(model_name_or_path=judge, model_revision=config.evaluate.judge_revision)


def make(build: Build) -> dict[str, Any]:
    """Writes `evaluation.json`: accuracies, rank correlations, and samples in numbers and to read.

    Also `samples.parquet` (all samples), `samples.csv` (their numbers) and pictures.
    """
    results = _preferences(build) | _samples(build)
    write_json(build.folder / "evaluation.json", results)
    return results


def describe(results: Mapping[str, Any]) -> Description:
    """Tables of numbers and samples."""
    from madpo_ray.evaluation.terminal import evaluation_tables

    return evaluation_tables(results)


STAGE = Stage(
    name="evaluate",
    help="Compare the policy with the reference on the test split.",
    settings=_settings,
    upstream=_upstream,
    content=_content,
    check=_check,
    make=make,
    describe=describe,
)


def _test_pairs(config: Config) -> pa.Table:
    rows = margins.STAGE.rows(config)
    names = [
        columns.PAIR_ID,
        columns.PROMPT,
        *columns.TOKEN_COLUMNS,
        *columns.REF_LOGPS,
        *config.score_columns,
    ]
    if columns.MARGIN in column_names(rows):
        names.append(columns.MARGIN)
    return read_split(rows, columns.TEST, names)


def _preferences(build: Build) -> dict[str, Any]:
    """How often policy, reference and reward model prefer the chosen response."""
    from madpo_ray.evaluation.measures import preference_metrics
    from madpo_ray.scoring.actors import score_table
    from madpo_ray.scoring.scorers import PolicyLogps

    config = build.config
    scorer = PolicyLogps(
        train.STAGE.model(config),
        config.model,
        base=initial_policy(config),
        columns=columns.POLICY_LOGPS,
        **config.scoring.forward_limits,
    )
    batch_size = config.scoring.batch_size
    test = _test_pairs(config)
    scored = score_table(test, [scorer], config.actors, batch_size=batch_size, notes=build.notes)
    return preference_metrics(scored, config.score_columns)


def _samples(build: Build) -> dict[str, Any]:
    """Samples of all policies in numbers, and some of two of them to read."""
    import pyarrow.parquet as pq

    from madpo_ray.evaluation.divergence import Sampled
    from madpo_ray.evaluation.samples import compare_policies, describe_samples, write_csv
    from madpo_ray.scoring.actors import score_table

    # Draw them.
    config = build.config
    require_same_tokens(config)
    policies = _policies(config)
    sampled = list(
        itertools.starmap(Sampled, itertools.product(policies, config.evaluate.temperatures))
    )
    prompts = _prompts(config)
    table = _draw(prompts, policies, build)

    # Score them.
    scorers = _scorers(config, sampled, policies)
    batch_size = config.scoring.batch_size
    table = score_table(table, scorers, config.actors, batch_size=batch_size, notes=build.notes)

    # Count.
    num_prompts = table.num_rows // SAMPLES_PER_PROMPT
    entries = describe_samples(table, sampled, reference=REFERENCE, num_prompts=num_prompts)
    pq.write_table(table, build.folder / "samples.parquet")
    write_csv(build.folder / "samples.csv", entries)
    _draw_pictures(build.folder / "pictures", entries)
    first = config.evaluate.temperatures[0]
    shown = table.slice(0, config.evaluate.num_shown)
    return {
        "sampling": entries,
        "comparisons": compare_policies(table, sampled, policy=POLICY, num_prompts=num_prompts),
        "samples": {
            when: shown[Sampled(name, first).text].to_pylist()
            for when, name in (("before", REFERENCE), ("after", POLICY))
        },
    }


def _policies(config: Config) -> dict[str, "PolicyFiles"]:
    """Whose samples are compared, by name."""
    from madpo_ray.evaluation.divergence import PolicyFiles

    initial = initial_policy(config)
    found = {
        POLICY: PolicyFiles(train.STAGE.model(config), initial),
        REFERENCE: PolicyFiles(initial, initial),
    }
    for name, folder in run_names(config).items():
        other = open_run(folder)
        found[name] = PolicyFiles(train.STAGE.model(other), initial_policy(other))
    return found


def _prompts(config: Config) -> pa.Table:
    """Prompts of the test split drawn at random: all once, then all again."""
    test = _test_pairs(config).select([columns.PAIR_ID, columns.PROMPT, columns.PROMPT_IDS])
    rng = random.Random(config.run.seed)
    count = math.ceil(config.evaluate.num_samples / SAMPLES_PER_PROMPT)
    drawn = [rng.randrange(test.num_rows) for _ in range(count)]
    return test.take(drawn * SAMPLES_PER_PROMPT)


def _draw(prompts: pa.Table, policies: dict[str, "PolicyFiles"], build: Build) -> pa.Table:
    from madpo_ray.evaluation.sampling import sample_responses

    config = build.config
    return sample_responses(
        prompts,
        config.actors,
        batch_size=config.evaluate.generation_batch_size,
        notes=build.notes,
        model=config.model,
        policies=policies,
        temperatures=config.evaluate.temperatures,
        max_new_tokens=config.evaluate.max_new_tokens,
        seed=config.run.seed,
    )


def _scorers(
    config: Config, sampled: list["Sampled"], policies: dict[str, "PolicyFiles"]
) -> list["Scorer"]:
    """What gives numbers to samples: their divergence and, if there is a judge, their reward."""
    from madpo_ray.evaluation.divergence import Divergences
    from madpo_ray.evaluation.judged import JudgedSamples

    scorers: list[Scorer] = [
        Divergences(
            [one for one in sampled if one.policy != REFERENCE],
            policies,
            policies[REFERENCE],
            config.model,
            **config.scoring.forward_limits,
        )
    ]
    if config.evaluate.judge is not None:
        scorers.append(JudgedSamples(sampled, _judge(config)))
    return scorers


def _judge(config: Config) -> "TextScorer":
    from madpo_ray.scoring.judges import ClassifierReward, FunctionReward

    judge = config.evaluate.judge
    assert judge is not None
    if kind_of(judge) == "function":
        return FunctionReward(judge, "evaluate.judge")
    classifier = _classifier(config)
    folder = fetch_model(classifier, "SEQ_CLS")
    limits = config.scoring.forward_limits
    return ClassifierReward(folder, classifier, key="evaluate.judge", **limits)


def _draw_pictures(folder: Path, entries: list[dict[str, Any]]) -> None:
    """Rewards by temperature, and against divergence, if samples were judged."""
    from madpo_ray.evaluation.charts import draw_frontier, draw_rewards

    judged = [entry for entry in entries if "reward" in entry]
    if judged:
        folder.mkdir()
        draw_rewards(judged, folder / "reward_by_temperature.png")
        draw_frontier(judged, folder / "frontier.png")
