"""Stage 3: the margin of every pair and the reference's log-probs, computed once, in one pass of Ray Data."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from madpo_ray import pairs, reward, sft
from madpo_ray.artifacts import Inputs, building, require
from madpo_ray.cluster import connected
from madpo_ray.config import Config, UserError, numerics_of
from madpo_ray.scoring import score_dataset
from madpo_ray.tables import count_rows, parquet_folder, read_split, write_rows


def inputs(config: Config) -> Inputs:
    settings: dict[str, Any] = {
        "pairs": pairs.inputs(config).fingerprint,
        "reward": reward.inputs(config).fingerprint,
        "calibrate": config.margins.calibrate,
        "reference": numerics_of(config.model),
    }
    return Inputs("margins", settings, {"reference": sft.start_inputs(config).fingerprint})


def folder(config: Config) -> Path:
    return config.run.folder / "margins"


def run(config: Config) -> Path:
    """Writes the margins artifact: the pairs with rewards (in calibrated units), margin and reference log-probs.

    Raises:
        UserError: the pairs or the reward model are missing or made from other inputs, or no temperature could be
        fitted.
    """
    require(pairs.folder(config), pairs.inputs(config))
    fitted = require(reward.folder(config), reward.inputs(config))["results"]
    temperature = fitted["temperature"] if config.margins.calibrate else 1.0
    if temperature is None:
        raise UserError(
            f"the reward model cannot be calibrated: {fitted['reason']}. Train it longer or on more pairs; "
            "margins.calibrate: false takes its margins as they are"
        )
    base = sft.start_folder(config)
    with building(folder(config), inputs(config)) as (partial, results), connected(config.cluster):
        with_margin = _scored(config, base).map_batches(
            _add_margin, fn_kwargs={"temperature": temperature}, batch_format="pyarrow"
        )
        write_rows(with_margin, parquet_folder(partial))
        results.update(_summary(parquet_folder(partial)), temperature=temperature)
        _refuse_lost_rows(parquet_folder(pairs.folder(config)), parquet_folder(partial))
    return folder(config)


def _scored(config: Config, base: Path) -> Any:
    import ray.data

    source = parquet_folder(pairs.folder(config))
    return score_dataset(
        ray.data.read_parquet(str(source)),
        config.cluster,
        num_rows=count_rows(source),
        batch_size=config.margins.batch_size,
        model=config.model,
        micro_batch_size=config.margins.per_device_eval_batch_size,
        reward_model=reward.folder(config) / "model",
        policies={"ref_": base},
    )


def _add_margin(table: pa.Table, temperature: float) -> pa.Table:
    """Rewards divided by the temperature, and their difference."""
    for side in ("chosen", "rejected"):
        index = table.column_names.index(f"{side}_reward")
        table = table.set_column(index, f"{side}_reward", pc.divide(table[f"{side}_reward"], temperature))
    return table.append_column("margin", pc.subtract(table["chosen_reward"], table["rejected_reward"]))


def _refuse_lost_rows(before: Path, after: Path) -> None:
    counts = count_rows(before), count_rows(after)
    if counts[0] != counts[1]:
        raise RuntimeError(f"{counts[0]} pairs went into scoring and {counts[1]} came out")


def _summary(data: Path) -> dict[str, Any]:
    """Pairs, mean margin and share of negative margins, by split."""
    summary = {}
    for split in pairs.SPLITS:
        margin = read_split(data, split, ("margin",))["margin"]
        negative = pc.mean(pc.less(margin, 0).cast(pa.float64())).as_py()
        summary[split] = {"pairs": len(margin), "margin": pc.mean(margin).as_py(), "negative_fraction": negative}
    return {"splits": summary}


def describe(results: Mapping[str, Any]) -> str:
    """The stage's outcome, a line a split."""
    return "\n".join(
        f"{split}: {numbers['pairs']} pairs, mean margin {numbers['margin']:.3f}, "
        f"{numbers['negative_fraction']:.1%} negative"
        for split, numbers in results["splits"].items()
        if numbers["pairs"]
    )
