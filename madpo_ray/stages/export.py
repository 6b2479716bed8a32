"""Stage export: pairs, reference log-probs, margins and weights as a data set for TRL's DPOTrainer.

By its own command, by `--until`, or by `madpo-ray margins --export trl`.
"""

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from madpo_ray import columns
from madpo_ray.artifacts.tables import column_names, split_batches
from madpo_ray.config import Config
from madpo_ray.data.messages import from_text
from madpo_ray.errors import UserError
from madpo_ray.stages import margins
from madpo_ray.stages.margins_report import weights_of
from madpo_ray.stages.stage import Build, Description, Stage

WEIGHT = "weight"


def _settings(config: Config) -> dict[str, Any]:
    return config.train.weighting


def make(build: Build) -> dict[str, Any]:
    """Writes one Parquet file per split, below `data/`, which `datasets.load_dataset` reads.

    Columns are `prompt`, `chosen`, `rejected` (texts, or lists of messages in `datasets`' type
    Json), `ref_chosen_logps`, `ref_rejected_logps` and, if there are rewards, `margin` and
    `weight`: MADPO's, at the settings of section train.

    Raises:
        UserError: some pairs are texts, and some are messages.
    """
    config = build.config
    rows = margins.STAGE.rows(config)
    build.rows.mkdir()
    counts = {}
    for split in columns.SPLITS:
        file = build.rows / f"{split}-00000-of-00001.parquet"
        counts[split] = _write_split(rows, split, file, config)
    return {"pairs": counts, WEIGHT: _settings(config)}


def describe(results: Mapping[str, Any]) -> Description:
    counts = ", ".join(f"{count} {split}" for split, count in results["pairs"].items())
    return [f"{counts} pairs for TRL: datasets.load_dataset on the folder export/data"]


STAGE = Stage(
    name="export",
    help="Write pairs, reference log-probs, margins and weights as a data set for TRL.",
    settings=_settings,
    upstream=lambda config: (margins.STAGE,),
    is_wanted=lambda config: False,
    uses_ray=False,
    make=make,
    describe=describe,
)


def _write_split(rows: Path, split: str, file: Path, config: Config) -> int:
    """Writes the pairs of a split, some at a time; no file for none. Returns how many."""
    count = 0
    with contextlib.ExitStack() as opened:
        writer = None
        for table in _tables(rows, split, config):
            if writer is None:
                writer = opened.enter_context(pq.ParquetWriter(file, table.schema))
            if table.schema != writer.schema:
                raise UserError(_explain_mixture(split))
            writer.write_table(table)
            count += table.num_rows
    return count


def _tables(rows: Path, split: str, config: Config) -> Iterator[pa.Table]:
    """The columns for TRL, some rows at a time; their schema names the types of `datasets`."""
    from datasets import Features, Json, List, Value

    numbers = [*columns.REF_LOGPS]
    if columns.MARGIN in column_names(rows):
        numbers.append(columns.MARGIN)
    for table in split_batches(rows, split, [columns.PAIR_ID, *columns.TEXT_COLUMNS, *numbers]):
        if table.num_rows == 0:
            continue
        features = {columns.PAIR_ID: Value("string")}
        exported = {columns.PAIR_ID: table[columns.PAIR_ID]}

        # Texts, or messages as JSON: in a struct each would have the keys of all others, as nulls.
        for name in columns.TEXT_COLUMNS:
            contents: list[Any] = [from_text(text) for text in table[name].to_pylist()]
            kinds = {type(content) for content in contents}
            if len(kinds) > 1:
                raise UserError(_explain_mixture(split))
            features[name] = Value("string")
            if kinds == {list}:
                features[name] = List(Json())
                contents = [[json.dumps(message) for message in one] for one in contents]
            exported[name] = pa.array(contents)

        # Numbers.
        for name in numbers:
            features[name] = Value("float64")
            exported[name] = table[name]
        if columns.MARGIN in numbers:
            features[WEIGHT] = Value("float64")
            exported[WEIGHT] = _weights(table[columns.MARGIN], config)
        yield pa.table(exported).cast(Features(features).arrow_schema)


def _explain_mixture(split: str) -> str:
    return (
        f"the pairs of split {split} cannot be exported: some are texts and some are messages, and "
        "a data set for TRL holds one kind"
    )


def _weights(margin: pa.ChunkedArray, config: Config) -> pa.Array:
    return pa.array(weights_of(margin.to_numpy(), config.train))
