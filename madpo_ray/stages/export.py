"""Stage export: pairs, reference log-probs, margins and weights as a data set for TRL's DPOTrainer.

Only by its own command, or by `madpo-ray margins --export trl`.
"""

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

    Columns are `prompt`, `chosen`, `rejected` (texts, or lists of messages), `ref_chosen_logps`,
    `ref_rejected_logps` and, if there are rewards, `margin` and `weight`: MADPO's, at the settings
    of section train.

    Raises:
        UserError: messages of several shapes, which a table cannot hold in one column.
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
    try:
        schemas = [table.schema for table in _tables(rows, split, config)]
        if not schemas:
            return 0
        schema = pa.unify_schemas(schemas, promote_options="permissive")
        count = 0
        with pq.ParquetWriter(file, schema) as writer:
            for table in _tables(rows, split, config):
                writer.write_table(table.cast(schema))
                count += table.num_rows
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError) as error:
        raise UserError(
            f"the pairs of split {split} cannot be exported: their messages have several shapes, "
            f"which a column of a table cannot hold ({error})"
        ) from None
    return count


def _tables(rows: Path, split: str, config: Config) -> Iterator[pa.Table]:
    """The columns for TRL, some rows at a time."""
    names = [columns.PAIR_ID, *columns.TEXT_COLUMNS, *columns.REF_LOGPS]
    if columns.MARGIN in column_names(rows):
        names.append(columns.MARGIN)
    for table in split_batches(rows, split, names):
        if table.num_rows == 0:
            continue
        table = table.drop_columns([columns.SPLIT])
        for name in columns.TEXT_COLUMNS:
            contents = pa.array([from_text(text) for text in table[name].to_pylist()])
            table = table.set_column(table.column_names.index(name), name, contents)
        if columns.MARGIN in names:
            table = table.append_column(WEIGHT, _weights(table[columns.MARGIN], config))
        yield table


def _weights(margin: pa.ChunkedArray, config: Config) -> pa.Array:
    return pa.array(weights_of(margin.to_numpy(), config.train))
