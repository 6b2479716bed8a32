"""Stage 5: what the training did, on the test split: preference accuracy, rank correlation, KL from samples, and
samples to read."""

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from rich.table import Table
from scipy.stats import spearmanr

from madpo_ray import margins, sft, train
from madpo_ray.artifacts import Inputs, building, require, write_json
from madpo_ray.calibration import interval
from madpo_ray.cluster import connected
from madpo_ray.config import Config, UserError, settings_of
from madpo_ray.generation import sample_responses
from madpo_ray.plan import TOKEN_COLUMNS
from madpo_ray.scoring import score_dataset
from madpo_ray.tables import parquet_folder, read_split


def inputs(config: Config) -> Inputs:
    settings = {
        "train": train.inputs(config).fingerprint,
        "seed": config.run.seed,
        "evaluate": settings_of(config.evaluate),
    }
    return Inputs("evaluate", settings)


def folder(config: Config) -> Path:
    return config.run.folder / "evaluate"


def run(config: Config) -> Path:
    """Writes `evaluation.json`.

    Raises:
        UserError: margins or policy are missing or made from other inputs, or the test split is empty.
    """
    require(margins.folder(config), margins.inputs(config))
    require(train.folder(config), train.inputs(config))
    scores = tuple(filter(None, (config.evaluate.chosen_score_column, config.evaluate.rejected_score_column)))
    columns = ("pair_id", *TOKEN_COLUMNS, "margin", "ref_chosen_logps", "ref_rejected_logps", *scores)
    test = read_split(parquet_folder(margins.folder(config)), "test", columns)
    if test.num_rows == 0:
        raise UserError("split test has no pairs to evaluate on: see data.test_fraction or data.split_column")
    policy, base = train.folder(config) / "model", sft.start_folder(config)
    with building(folder(config), inputs(config)) as (partial, results), connected(config.cluster):
        results.update(preference_metrics(_scored(test, config, policy_=policy), scores))
        results.update(_divergence_and_samples(test, config, policy, base))
        write_json(partial / "evaluation.json", results)
    return folder(config)


def _scored(table: pa.Table, config: Config, **policies: Path) -> pa.Table:
    """The pairs with each policy's log-probs, in order."""
    import ray.data

    scored = score_dataset(
        ray.data.from_arrow(table),
        config.cluster,
        num_rows=table.num_rows,
        batch_size=config.margins.batch_size,
        model=config.model,
        micro_batch_size=config.evaluate.per_device_eval_batch_size,
        policies=policies,
    )
    return pa.concat_tables(list(scored.iter_batches(batch_format="pyarrow", batch_size=None)))


def preference_metrics(scored: pa.Table, score_columns: tuple[str, ...]) -> dict[str, Any]:
    """Accuracies with 95 % intervals, and Spearman's rank correlation with the true margin where scores are known.

    `reference` and `policy` rank by the log-prob of the whole response, `implicit` by the policy's log-ratio to the
    reference, `reward_model` by its margin.
    """
    column = {
        name: scored[name].to_numpy() for name in scored.column_names if name.endswith("_logps") or name == "margin"
    }
    reference = column["ref_chosen_logps"] - column["ref_rejected_logps"]
    policy = column["policy_chosen_logps"] - column["policy_rejected_logps"]
    rankings = {
        "reference": reference,
        "policy": policy,
        "implicit": policy - reference,
        "reward_model": column["margin"],
    }
    true = scored[score_columns[0]].to_numpy() - scored[score_columns[1]].to_numpy() if score_columns else None
    metrics: dict[str, Any] = {"test_pairs": scored.num_rows}
    for name, differences in rankings.items():
        right = int((differences > 0).sum())
        metrics[name] = {"accuracy": right / len(differences), "accuracy_interval": interval(right, len(differences))}
        if true is not None:
            metrics[name]["rank_correlation"] = float(spearmanr(differences, true).statistic)
    return metrics


def _divergence_and_samples(test: pa.Table, config: Config, policy: Path, base: Path) -> dict[str, Any]:
    """KL(policy || reference) in nats a response, from the policy's own samples, and samples of both to read."""
    settings = config.evaluate
    rng = random.Random(config.run.seed)
    count = -(-settings.num_samples // 2)  # two samples a prompt make a pair, which the scorer reads at once
    drawn = [rng.randrange(test.num_rows) for _ in range(count)]
    sampled = sample_responses(
        test.select(["pair_id", "prompt_ids"]).take(drawn + drawn),
        config.cluster,
        batch_size=settings.per_device_eval_batch_size * 2,
        model=config.model,
        policies={"after": policy, "before": base},
        max_new_tokens=settings.max_new_tokens,
        seed=config.run.seed,
    )
    ids = sampled["after_ids"].combine_chunks()
    pairs = sampled.select(["pair_id", "prompt_ids"]).slice(0, count)
    pairs = pairs.append_column("chosen_ids", ids[:count]).append_column("rejected_ids", ids[count:])
    scored = _scored(pairs, config, policy_=policy, ref_=base)
    gaps = np.concatenate(
        [
            scored[f"policy_{side}_logps"].to_numpy() - scored[f"ref_{side}_logps"].to_numpy()
            for side in ("chosen", "rejected")
        ]
    )
    samples = {name: sampled[name].slice(0, settings.num_shown).to_pylist() for name in ("before", "after")}
    standard_error = float(gaps.std(ddof=1) / np.sqrt(len(gaps)))
    return {"kl": float(gaps.mean()), "kl_standard_error": standard_error, "kl_samples": len(gaps), "samples": samples}


def as_tables(results: Mapping[str, Any]) -> list[Table]:
    """The evaluation for a terminal: numbers, then samples before and after."""
    names = {
        "reference": "reference, by log-prob",
        "policy": "policy, by log-prob",
        "implicit": "policy, by implicit reward",
        "reward_model": "reward model, by margin",
    }
    numbers = Table(title=f"Test split, {results['test_pairs']} pairs")
    for heading in ("ranked by", "accuracy", "95 % interval", "rank correlation with true margin"):
        numbers.add_column(heading)
    for key, label in names.items():
        low, high = results[key]["accuracy_interval"]
        correlation = results[key].get("rank_correlation")
        shown = "-" if correlation is None else f"{correlation:.3f}"
        numbers.add_row(label, f"{results[key]['accuracy']:.3f}", f"{low:.3f} to {high:.3f}", shown)
    numbers.caption = (
        f"KL(policy || reference) {results['kl']:.3f} ± {results['kl_standard_error']:.3f} nats a response "
        f"({results['kl_samples']} samples)"
    )
    samples = Table(title="Samples for the same prompts", show_lines=True)
    samples.add_column("before")
    samples.add_column("after")
    for before, after in zip(results["samples"]["before"], results["samples"]["after"], strict=True):
        samples.add_row(before.strip(), after.strip())
    return [numbers, samples]
