"""Stage pairs: read preference pairs, check every row, tokenise, split.

Good rows get a stable id, bad ones a reason.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from madpo_ray import columns
from madpo_ray.artifacts.manifest import hash_file
from madpo_ray.cluster import write_rows
from madpo_ray.config import Config, DataConfig
from madpo_ray.data.formats import BadRowError, parse_pair
from madpo_ray.data.reader import PairReader
from madpo_ray.data.sources import open_source
from madpo_ray.data.splits import count_repeats
from madpo_ray.errors import UserError, did_you_mean
from madpo_ray.models.source import base_model, check_model, model_inputs
from madpo_ray.stages.stage import Build, Report, Stage

if TYPE_CHECKING:
    import ray.data
    from transformers import PreTrainedTokenizerBase

# ray.data and transformers take seconds to import, and a dry run does not need them: they are
# imported inside functions.


def _settings(config: Config) -> dict[str, Any]:
    return {
        "seed": config.run.seed,
        "data": config.data.fingerprinted(),
        "model": config.model.names(),
    }


def _content(config: Config) -> dict[str, Any]:
    return {
        "files": {file: hash_file(Path(file)) for file in config.data.files},
        "model": model_inputs(config.model).fingerprint,
    }


def _check(config: Config) -> None:
    check_model(config.model)
    check_files(config.data)


def check_files(data: DataConfig) -> None:
    """Raises UserError if a file is missing, of an unknown kind, or lacks a column."""
    needed = [columns.CHOSEN, columns.REJECTED, *data.keep_columns]
    needed += [name for name in (data.split_column, data.group_column) if name is not None]
    for file in data.files:
        available = open_source(file).columns()
        if available is None:
            continue
        for name in needed:
            if name not in available:
                raise UserError(
                    f"data.files: {file} has no column {name!r}{did_you_mean(name, available)}"
                )


def make(build: Build) -> dict[str, Any]:
    """Writes `data/*.parquet` in the order of the files, and `rejects.parquet`.

    Raises:
        UserError: the pairs are messages and the tokenizer has no chat template, or no pair is left
            to train or validate on.
    """
    config = build.config
    folder = base_model(config.model, config.run)
    is_conversational = _is_conversational(config.data)
    if is_conversational:
        _check_template(config, folder)

    checked = _read_all(config, folder, is_conversational)
    results = _counts(checked)
    _refuse_empty(results, config.data)

    repeats = count_repeats(_hashes(checked))
    good = checked.map_batches(_identify, fn_kwargs={"repeats": repeats}, batch_format="pyarrow")
    write_rows(good, build.rows)
    rejected = [_rejects(table) for table in _tables(checked)]
    pq.write_table(pa.concat_tables(rejected), build.folder / "rejects.parquet")
    return results


def describe(results: Mapping[str, Any]) -> Report:
    """Pairs by split, and rejects by reason."""
    counts = ", ".join(f"{count} {split}" for split, count in results["pairs"].items())
    lines = [f"{counts} pairs"]
    rejects = Counter(results["rejects"])
    if rejects:
        lines.append(f"{rejects.total()} rejected, listed in rejects.parquet:")
        lines += [f"  {count} x {reason}" for reason, count in rejects.most_common()]
    return lines


STAGE = Stage(
    name="pairs",
    help="Read and check preference pairs, tokenise and split them.",
    settings=_settings,
    content=_content,
    check=_check,
    make=make,
    describe=describe,
)


class _ReaderActor:
    """A Ray Data actor around a PairReader."""

    def __init__(self, config: Config, folder: Path, is_conversational: bool) -> None:
        self._reader = PairReader(
            config.data,
            _load_tokenizer(config, folder),
            seed=config.run.seed,
            is_conversational=is_conversational,
        )

    def __call__(self, files: pa.Table) -> Iterator[pa.Table]:
        numbers = files[columns.FILE_NUMBER].to_pylist()
        for number, file in zip(numbers, files[columns.FILE].to_pylist(), strict=True):
            yield from self._reader.tables(file, number)


def _read_all(config: Config, folder: Path, is_conversational: bool) -> "ray.data.Dataset":
    """All checked rows, good and bad, in the order of the files, held in Ray's object store."""
    import ray.data

    files = config.data.files
    table = pa.table({columns.FILE_NUMBER: range(len(files)), columns.FILE: list(files)})
    num_actors = min(len(files), config.cluster.num_workers)
    return (
        ray.data.from_arrow(table)
        .repartition(len(files))
        .map_batches(
            _ReaderActor,
            fn_constructor_kwargs={
                "config": config,
                "folder": folder,
                "is_conversational": is_conversational,
            },
            batch_format="pyarrow",
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=num_actors),
        )
        .materialize()
    )


def _is_conversational(data: DataConfig) -> bool:
    """Whether the first good row holds messages; a run reads one kind."""
    for file in data.files:
        for row in open_source(file).rows():
            try:
                if isinstance(row, dict):
                    return isinstance(parse_pair(row)[columns.PROMPT], list)
            except BadRowError:
                continue
    return False


def _load_tokenizer(config: Config, folder: Path) -> "PreTrainedTokenizerBase":
    from madpo_ray.models.loading import load_tokenizer

    return load_tokenizer(folder, config.model)


def _check_template(config: Config, folder: Path) -> None:
    if not _load_tokenizer(config, folder).chat_template:
        raise UserError(
            "the pairs are messages and the tokenizer has no chat template: set "
            "model.chat_template_path"
        )


def _tables(dataset: "ray.data.Dataset") -> Iterator[pa.Table]:
    yield from dataset.iter_batches(batch_format="pyarrow", batch_size=None)


def _counts(checked: "ray.data.Dataset") -> dict[str, dict[str, int]]:
    """Good rows by split, rejects by reason."""
    splits: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    for table in _tables(checked.select_columns([columns.SPLIT, columns.REASON])):
        splits.update(table[columns.SPLIT].drop_null().to_pylist())
        reasons.update(table[columns.REASON].drop_null().to_pylist())
    return {
        "pairs": {split: splits[split] for split in columns.SPLITS},
        "rejects": dict(reasons),
    }


def _hashes(checked: "ray.data.Dataset") -> Iterator[tuple[str, tuple[int, int]]]:
    """Content hash, and file number and row, of each good row."""
    names = [columns.CONTENT_HASH, columns.FILE_NUMBER, columns.ROW]
    for table in _tables(checked.select_columns(names)):
        cells = zip(*(table[name].to_pylist() for name in names), strict=True)
        for digest, file_number, row in cells:
            if digest is not None:
                yield digest, (file_number, row)


def _identify(table: pa.Table, repeats: dict[tuple[int, int], int]) -> pa.Table:
    """The good rows, with `pair_id` = content hash and occurrence number."""
    good = table.filter(pc.is_null(table[columns.REASON]))
    digests = good[columns.CONTENT_HASH].to_pylist()
    file_numbers = good[columns.FILE_NUMBER].to_pylist()
    places = zip(file_numbers, good[columns.ROW].to_pylist(), strict=True)
    ids = [
        f"{digest}-{repeats.get(place, 0)}" for digest, place in zip(digests, places, strict=True)
    ]
    kept = good.drop_columns(
        [columns.FILE, columns.FILE_NUMBER, columns.ROW, columns.REASON, columns.CONTENT_HASH]
    )
    return kept.add_column(0, columns.PAIR_ID, pa.array(ids, type=pa.string()))


def _rejects(table: pa.Table) -> pa.Table:
    bad = table.filter(pc.is_valid(table[columns.REASON]))
    return bad.select([columns.FILE, columns.ROW, columns.REASON])


def _refuse_empty(results: Mapping[str, Any], data: DataConfig) -> None:
    counts = results["pairs"]
    if not sum(counts.values()):
        common = Counter(results["rejects"]).most_common(5)
        reasons = "; ".join(f"{count} x {reason}" for reason, count in common)
        raise UserError(
            f"no usable pair in {', '.join(data.files)}: {reasons or 'the files are empty'}"
        )
    for split in (columns.TRAIN, columns.VALIDATION):
        if not counts[split]:
            raise UserError(
                f"no pair is in split {split} (pairs: {counts}). Pairs of one group stay in one "
                "split: if all have one prompt, set data.group_column or data.split_column; else "
                "raise data.validation_fraction or test_fraction"
            )
