"""Stage pairs: read preference pairs, check every row, tokenise, split.

Good rows get a stable id, bad ones a reason.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from madpo_ray import columns
from madpo_ray.artifacts.tables import count_rows, read_columns
from madpo_ray.config import Config, DataConfig
from madpo_ray.data.checks import check_counts, check_files, holds_messages
from madpo_ray.data.files import DataFile, Piece, forget_versions
from madpo_ray.data.reader import PairReader
from madpo_ray.data.sources import list_files, open_source
from madpo_ray.data.splits import Found, Repeats, RowKey, find_repeats, require_order
from madpo_ray.errors import UserError
from madpo_ray.models.limits import check_lengths, check_vocabulary
from madpo_ray.models.source import base_model, check_model, model_inputs
from madpo_ray.passes import BatchNotes, write_rows
from madpo_ray.stages.pairs_summary import add_first_rejects, describe, left_out_kinds
from madpo_ray.stages.stage import Build, Stage
from madpo_ray.waiting import waiting

if TYPE_CHECKING:
    import ray.data
    from transformers import PreTrainedTokenizerBase

# ray.data and transformers are imported inside functions: they take seconds, and neither
# `--help` nor a wrong config should wait.

ROW_KEY = (columns.FILE_NUMBER, columns.ROW, columns.PAIR)
MAX_BLOCKS = 1024  # of files, or pieces of them, that Ray Data keeps track of
REPEATED = "occurs more than once, or also with chosen and rejected swapped"
REJECTS = pa.schema(
    [
        (columns.FILE, pa.string()),
        (columns.ROW, pa.int64()),
        (columns.REASON, pa.string()),
    ]
)
ONLY_WHILE_READING = [
    columns.FILE,
    columns.FILE_NUMBER,
    columns.ROW,
    columns.PAIR,
    columns.REASON,
    columns.REASON_KIND,
    columns.CONTENT_HASH,
    columns.SWAPPED_HASH,
    columns.NUM_CUT,
    columns.PROMPT_REPEATS,
]
# What is counted and compared of all rows.
FACTS = [columns.SPLIT, *(name for name in ONLY_WHILE_READING if name != columns.REASON)]


def _settings(config: Config) -> dict[str, Any]:
    data = config.data.fingerprinted()
    del data["files"]  # their content counts
    return {"seed": config.run.seed, "data": data}


def _content(config: Config) -> dict[str, Any]:
    files = list_files(config.data.files)
    hashes = {f"files[{i}]": DataFile(file).version() for i, file in enumerate(files)}
    return {**hashes, "model": model_inputs(config.model).fingerprint}


def _names(config: Config) -> dict[str, Any]:
    return {"files": list(config.data.files), **config.model.names()}


def _check(config: Config) -> None:
    check_model(config.model)
    folder = Path(config.model.model_name_or_path)
    if folder.is_dir():
        check_lengths(folder, config.data.max_length)
    if config.data.split_column is None and config.data.validation_fraction == 0:
        raise UserError("data.validation_fraction: 0 leaves no pair to validate on: raise it")
    check_files(config.data)


def make(build: Build) -> dict[str, Any]:
    """Writes `data/*.parquet` in the order of the files, and `rejects.parquet`.

    Raises:
        UserError: model, tokenizer and lengths do not fit, the pairs are messages and the tokenizer
            has no chat template, too many rows are rejected, or no pair is left to train or
            validate on.
    """
    config = build.config
    folder = base_model(config.model, config.run)
    tokenizer = _load_tokenizer(config, folder)
    _check_tokenizer(config, folder, tokenizer)

    files = list_files(config.data.files)
    checked = _read_all(build, folder, files)
    facts = checked.select_columns(FACTS).materialize()  # once: each pass starts tasks
    repeats = find_repeats(lambda: _found(facts), config.data)
    results = _counts(facts, files, repeats, config.data)
    results["template_unused"] = bool(tokenizer.chat_template) and not holds_messages(config.data)
    check_counts(results, config.data)
    forget_versions()

    good = checked.map_batches(_identify, fn_kwargs={"repeats": repeats}, batch_format="pyarrow")
    write_rows(good, build.rows)
    written = count_rows(build.rows)
    if written != sum(results["pairs"].values()):  # as through old listings of a folder
        raise RuntimeError(f"{written} pairs were written, not {results['pairs']}")
    pair_ids = read_columns(build.rows, [columns.PAIR_ID])[columns.PAIR_ID].to_pylist()
    require_order(_found(facts), pair_ids, repeats)

    tables = [REJECTS.empty_table()]
    if results["rejects"]:
        left_out = left_out_kinds(config.data)
        rejects = checked.map_batches(
            _rejects, fn_kwargs={"left_out": left_out}, batch_format="pyarrow"
        )
        tables += _tables(rejects)
    pq.write_table(pa.concat_tables(tables), build.folder / "rejects.parquet")
    return results


STAGE = Stage(
    name="pairs",
    help="Read and check preference pairs, tokenise and split them.",
    settings=_settings,
    content=_content,
    names=_names,
    check=_check,
    make=make,
    describe=describe,
)


class _ReaderActor:
    """A Ray Data actor around a PairReader."""

    def __init__(self, config: Config, folder: Path, notes: BatchNotes) -> None:
        self._notes = notes
        tokenizer = _load_tokenizer(config, folder)
        self._reader = PairReader(config.data, tokenizer, seed=config.run.seed)

    def __call__(self, pieces: pa.Table) -> Iterator[pa.Table]:
        for row in pieces.to_pylist():
            file = row[columns.FILE]
            piece = Piece(**{name: row[name] for name in Piece._fields})
            with self._notes.working_on(f"the file {file} from row {piece.first_row} on"):
                yield from self._reader.tables(file, row[columns.FILE_NUMBER], piece)


def _read_all(build: Build, folder: Path, files: Sequence[str]) -> "ray.data.Dataset":
    """All checked rows, good and bad, in the order of the files, held in Ray's object store."""
    import ray.data

    config = build.config
    pieces = pa.Table.from_pylist(
        [
            {columns.FILE_NUMBER: number, columns.FILE: file, **piece._asdict()}
            for number, file in enumerate(files)
            for piece in open_source(file).pieces()
        ]
    )
    num_actors = min(pieces.num_rows, config.cluster.num_workers)
    checked = (
        ray.data.from_arrow(pieces)
        .repartition(min(pieces.num_rows, MAX_BLOCKS))
        .map_batches(
            _ReaderActor,
            fn_constructor_kwargs={"config": config, "folder": folder, "notes": build.notes},
            batch_format="pyarrow",
            batch_size=None,
            compute=ray.data.ActorPoolStrategy(size=num_actors),
            num_cpus=min(1, config.cluster.cpus_per_worker),
        )
    )
    what = f"{num_actors} actors read and tokenise {len(files)} files"
    with build.notes.reporting_deaths(), waiting(what):
        return checked.materialize()


def _load_tokenizer(config: Config, folder: Path) -> "PreTrainedTokenizerBase":
    from madpo_ray.models.loading import load_tokenizer

    return load_tokenizer(folder, config.model)


def _check_tokenizer(config: Config, folder: Path, tokenizer: "PreTrainedTokenizerBase") -> None:
    """Raises UserError if model, tokenizer, lengths and pairs do not fit each other."""
    check_lengths(folder, config.data.max_length)
    check_vocabulary(folder, tokenizer.get_vocab())
    are_messages = holds_messages(config.data)
    if are_messages and not tokenizer.chat_template:
        raise UserError(
            "the pairs are messages and the tokenizer has no chat template: set "
            "model.chat_template_path"
        )
    if not are_messages and tokenizer.eos_token_id is None:
        raise UserError(
            "the pairs are texts, and the tokenizer has no end-of-sequence token to end responses "
            "with: set eos_token in its tokenizer_config.json"
        )


def _tables(dataset: "ray.data.Dataset") -> Iterator[pa.Table]:
    yield from dataset.iter_batches(batch_format="pyarrow", batch_size=None)


def _counts(
    facts: "ray.data.Dataset", files: Sequence[str], repeats: Repeats, data: DataConfig
) -> dict[str, Any]:
    """Good rows and cut responses by split, repeats, rejects by kind of reason, and the left out.

    Together `pairs`, `rejects` and `left_out` are all that was read.
    """
    pairs: Counter[str] = Counter()
    cut: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    prompt_repeats: Counter[int] = Counter()
    per_file: Counter[str] = Counter()
    first_rejects: dict[str, str] = {}
    for table in _tables(facts):
        add_first_rejects(table, first_rejects)
        reasons.update(table[columns.REASON_KIND].drop_null().to_pylist())
        good = _kept(table, repeats)
        splits = good[columns.SPLIT].to_pylist()
        pairs.update(splits)
        for split, num_cut in zip(splits, good[columns.NUM_CUT].to_pylist(), strict=True):
            cut[split] += num_cut
        per_file.update(good[columns.FILE].to_pylist())
        prompt_repeats.update(good[columns.PROMPT_REPEATS].to_pylist())

    # What the config leaves out is no reject.
    counts = {kind: reasons.pop(kind, 0) for kind in left_out_kinds(data)}

    # By split, in the order of the splits.
    return {
        "pairs": {split: pairs[split] for split in columns.SPLITS},
        "duplicates": repeats.num_duplicates,
        "contradictions": repeats.num_contradictions,
        "left_out": {**counts, REPEATED: len(repeats.left_out)},
        "cut_responses": {split: cut[split] for split in columns.SPLITS},
        "repeated_prompts": prompt_repeats[2],
        "quoted_prompts": prompt_repeats[1],
        "rejects": dict(reasons),
        "first_rejects": {kind: first_rejects[kind] for kind in reasons},
        "files_without_pairs": [file for file in files if not per_file[file]],
    }


def _found(facts: "ray.data.Dataset") -> Iterator[Found]:
    """The good rows, in order."""
    names = [*ROW_KEY, columns.CONTENT_HASH, columns.SWAPPED_HASH, columns.SPLIT]
    for table in _tables(facts):
        good = table.filter(pc.is_valid(table[columns.CONTENT_HASH]))
        values = (good[name].to_pylist() for name in names)
        for *place, content, swapped, split in zip(*values, strict=True):
            yield Found(tuple(place), content, swapped, split)


def _identify(table: pa.Table, repeats: Repeats) -> pa.Table:
    """The good rows that are kept, with `pair_id` = content hash and occurrence number."""
    good = _kept(table, repeats)
    digests = good[columns.CONTENT_HASH].to_pylist()
    ids = [
        f"{digest}-{repeats.occurrences.get(place, 0)}"
        for digest, place in zip(digests, _row_keys(good), strict=True)
    ]
    kept = good.drop_columns(ONLY_WHILE_READING)
    return kept.add_column(0, columns.PAIR_ID, pa.array(ids, type=pa.string()))


def _kept(table: pa.Table, repeats: Repeats) -> pa.Table:
    """The good rows without those that repeat and are left out."""
    good = table.filter(pc.is_null(table[columns.REASON_KIND]))
    if not repeats.left_out:
        return good
    is_kept = [place not in repeats.left_out for place in _row_keys(good)]
    return good.filter(pa.array(is_kept, pa.bool_()))


def _row_keys(table: pa.Table) -> list[RowKey]:
    return list(zip(*(table[name].to_pylist() for name in ROW_KEY), strict=True))


def _rejects(table: pa.Table, left_out: Sequence[str]) -> pa.Table:
    is_reject = pc.is_valid(table[columns.REASON])
    is_left_out = pc.is_in(table[columns.REASON_KIND], value_set=pa.array(left_out, pa.string()))
    bad = table.filter(pc.and_(is_reject, pc.invert(is_left_out)))
    return bad.select(REJECTS.names)
