"""Stage 1: read preference pairs, check every row, tokenise, split. Good rows get a stable id, bad ones a reason.

Takes TRL's formats from Parquet and JSON Lines: standard (strings), conversational (lists of messages), and both with
an implicit prompt (no `prompt` column: the common beginning of chosen and rejected).
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from madpo_ray.artifacts import Inputs, building, hash_file
from madpo_ray.cluster import connected
from madpo_ray.config import Config, DataConfig, ModelConfig, UserError, nearest, settings_of, tokens_of
from madpo_ray.formats import ROWS_PER_BATCH, BadRowError, Row, parse_pair, read_file, tokenize_pair
from madpo_ray.models import base_folder, load_tokenizer, model_inputs
from madpo_ray.tables import parquet_folder, write_rows

SPLITS = ("train", "validation", "test")


def inputs(config: Config) -> Inputs:
    settings = {"seed": config.run.seed, "data": settings_of(config.data), "model": tokens_of(config.model)}
    content = {
        "files": {file: hash_file(Path(file)) for file in config.data.files},
        "model": model_inputs(config).fingerprint,
    }
    return Inputs("pairs", settings, content)


def folder(config: Config) -> Path:
    return config.run.folder / "pairs"


def check_files(data: DataConfig) -> None:
    """Raises UserError where a file is missing, of an unknown kind, or lacks a column that the config needs."""
    for name in data.files:
        path = Path(name)
        if not path.is_file():
            raise UserError(f"data.files: {path} does not exist")
        if path.suffix not in (".parquet", ".jsonl"):
            raise UserError(f"data.files: {path.name} must end in .parquet or .jsonl")
        columns = _columns(path)
        if columns is None:
            continue
        needed = ["chosen", "rejected", *data.keep_columns, *filter(None, [data.split_column, data.group_column])]
        for column in needed:
            if column not in columns:
                raise UserError(f"data.files: {path} has no column {column!r}{nearest(column, columns)}")


def _columns(path: Path) -> list[str] | None:
    """A file's columns: a Parquet schema's, or the keys of the first JSON line that parses; None where there is
    none."""
    if path.suffix == ".parquet":
        try:
            return list(pq.read_schema(path).names)
        except pa.ArrowInvalid as error:
            raise UserError(f"data.files: {path} is no Parquet file ({error})") from None
    for _, row in read_file(path):
        if isinstance(row, dict):
            return list(row)
    return None


def content_hash(pair: Row) -> str:
    """16 hex digits of what the pair says."""
    text = json.dumps([pair["prompt"], pair["chosen"], pair["rejected"]], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def split_of(group: str, data: DataConfig, seed: int) -> str:
    """The split of a group, by hash: no pair's place depends on which others there are."""
    digest = hashlib.sha256(f"{seed}:{group}".encode()).digest()
    share = int.from_bytes(digest[:8], "big") / 2**64
    if share < data.test_fraction:
        return "test"
    return "validation" if share < data.test_fraction + data.validation_fraction else "train"


class PairReader:
    """Reads, checks and tokenises one file after another; both good and bad rows come out, the bad ones with
    `reason`."""

    def __init__(self, data: DataConfig, model: ModelConfig, base: Path, seed: int, conversational: bool) -> None:
        self._data, self._seed, self._conversational = data, seed, conversational
        self._tokenizer = load_tokenizer(base, model)
        self._schema = schema(data, conversational)

    def __call__(self, files: pa.Table) -> Iterator[pa.Table]:
        for number, name in zip(files["file_number"].to_pylist(), files["file"].to_pylist(), strict=True):
            rows: list[Row] = []
            for row_number, row in read_file(Path(name)):
                rows.append({"file": name, "file_number": number, "row": row_number, **self._checked(row)})
                if len(rows) == ROWS_PER_BATCH:
                    yield pa.Table.from_pylist(rows, schema=self._schema)
                    rows = []
            yield pa.Table.from_pylist(rows, schema=self._schema)

    def _checked(self, row: Row | str) -> Row:
        try:
            if isinstance(row, str):
                raise BadRowError(row)
            pair = parse_pair(row)
            if isinstance(pair["prompt"], list) != self._conversational:
                raise BadRowError("text among messages, or messages among text: one run takes one kind")
            tokens = tokenize_pair(pair, self._tokenizer, self._data.max_length)
            group, split = (self._named(row, name) for name in (self._data.group_column, self._data.split_column))
            group = json.dumps(pair["prompt"], sort_keys=True) if group is None else group
            split = split_of(group, self._data, self._seed) if split is None else split
            if split not in SPLITS:
                raise BadRowError(f"{self._data.split_column} is {split!r}, not one of {', '.join(SPLITS)}")
            kept = {name: self._number(row, name) for name in self._data.keep_columns}
        except BadRowError as error:
            return {"reason": str(error)}
        return {**pair, **tokens, **kept, "content_hash": content_hash(pair), "group": group, "split": split}

    @staticmethod
    def _named(row: Row, column: str | None) -> str | None:
        if column is None:
            return None
        if row.get(column) is None:
            raise BadRowError(f"{column} is missing")
        return str(row[column])

    @staticmethod
    def _number(row: Row, column: str) -> float:
        value = row.get(column)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise BadRowError(f"{column} is no number")
        return float(value)


def schema(data: DataConfig, conversational: bool) -> pa.Schema:
    """Columns of the reader's rows."""
    text = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())])) if conversational else pa.string()
    ids = pa.list_(pa.int32())
    return pa.schema(
        [
            *[("file", pa.string()), ("file_number", pa.int64()), ("row", pa.int64()), ("reason", pa.string())],
            *[(name, text) for name in ("prompt", "chosen", "rejected")],
            *[(name, ids) for name in ("prompt_ids", "chosen_ids", "rejected_ids")],
            *[("content_hash", pa.string()), ("group", pa.string()), ("split", pa.string())],
            *[(name, pa.float64()) for name in data.keep_columns],
        ]
    )


def run(config: Config) -> Path:
    """Writes the pairs artifact: `data/*.parquet` in the order of the files, and `rejects.parquet`.

    Raises:
        UserError: a file or column is missing, or no pair is left to train or validate on.
    """
    check_files(config.data)
    base = base_folder(config)
    if _is_conversational(config.data) and not load_tokenizer(base, config.model).chat_template:
        raise UserError("the pairs are messages and the tokenizer has no chat template: set model.chat_template_path")
    with building(folder(config), inputs(config)) as (partial, results), connected(config.cluster):
        checked = _read_all(config, base)
        results.update(_counts(checked))
        _refuse_empty(results, config.data)
        good = checked.map_batches(_identify, fn_kwargs={"repeats": _repeats(checked)}, batch_format="pyarrow")
        write_rows(good, parquet_folder(partial))
        rejected = [_rejects(table) for table in checked.iter_batches(batch_format="pyarrow", batch_size=None)]
        pq.write_table(pa.concat_tables(rejected), partial / "rejects.parquet")
    return folder(config)


def _read_all(config: Config, base: Path) -> Any:
    """All checked rows, good and bad, in the order of the files, held in Ray's object store."""
    import ray.data

    files = config.data.files
    table = pa.table({"file_number": range(len(files)), "file": list(files)})
    return (
        ray.data.from_arrow(table)
        .repartition(len(files))
        .map_batches(
            PairReader,
            fn_constructor_kwargs={
                "data": config.data,
                "model": config.model,
                "base": base,
                "seed": config.run.seed,
                "conversational": _is_conversational(config.data),
            },
            batch_format="pyarrow",
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=min(len(files), config.cluster.num_workers)),
        )
        .materialize()
    )


def _is_conversational(data: DataConfig) -> bool:
    """The kind of the first good row; a run takes one kind."""
    for name in data.files:
        for _, row in read_file(Path(name)):
            try:
                if isinstance(row, dict):
                    return isinstance(parse_pair(row)["prompt"], list)
            except BadRowError:
                continue
    return False


def _counts(checked: Any) -> dict[str, dict[str, int]]:
    """Good rows by split, rejects by reason."""
    counted: dict[str, Counter[str]] = {"split": Counter(), "reason": Counter()}
    for table in checked.select_columns(list(counted)).iter_batches(batch_format="pyarrow", batch_size=None):
        for name, counter in counted.items():
            counter.update(value for value in table[name].to_pylist() if value is not None)
    return {"pairs": {split: counted["split"][split] for split in SPLITS}, "rejects": dict(counted["reason"])}


def _repeats(checked: Any) -> dict[tuple[int, int], int]:
    """How often the same pair stood before, by (file number, row), for those that repeat."""
    seen: Counter[str] = Counter()
    repeats = {}
    columns = ["content_hash", "file_number", "row"]
    for table in checked.select_columns(columns).iter_batches(batch_format="pyarrow", batch_size=None):
        for digest, *place in zip(*(table[name].to_pylist() for name in columns), strict=True):
            if digest is not None:
                if seen[digest]:
                    repeats[tuple(place)] = seen[digest]
                seen[digest] += 1
    return repeats


def _identify(table: pa.Table, repeats: dict[tuple[int, int], int]) -> pa.Table:
    """The good rows, with `pair_id` = content hash and occurrence number."""
    good = table.filter(pc.is_null(table["reason"]))
    places = zip(good["file_number"].to_pylist(), good["row"].to_pylist(), strict=True)
    digests = good["content_hash"].to_pylist()
    ids = [f"{digest}-{repeats.get(place, 0)}" for digest, place in zip(digests, places, strict=True)]
    kept = good.drop_columns(["file", "file_number", "row", "reason", "content_hash"])
    return kept.add_column(0, "pair_id", pa.array(ids, type=pa.string()))


def _rejects(table: pa.Table) -> pa.Table:
    return table.filter(pc.is_valid(table["reason"])).select(["file", "row", "reason"])


def _refuse_empty(results: Mapping[str, Any], data: DataConfig) -> None:
    counts, rejects = results["pairs"], results["rejects"]
    if not sum(counts.values()):
        reasons = (
            "; ".join(f"{count} x {reason}" for reason, count in Counter(rejects).most_common(5))
            or "the files are empty"
        )
        raise UserError(f"no usable pair in {', '.join(data.files)}: {reasons}")
    for split in ("train", "validation"):
        if not counts[split]:
            raise UserError(
                f"no pair falls into split {split} (pairs: {counts}). Pairs of one group never part: if all "
                "share a prompt, name a data.group_column or data.split_column; else give data.validation_fraction "
                "and test_fraction room"
            )


def describe(results: Mapping[str, Any]) -> str:
    """The stage's outcome in a line or more: pairs by split, rejects by reason."""
    lines = [", ".join(f"{count} {split}" for split, count in results["pairs"].items()) + " pairs"]
    if results["rejects"]:
        lines.append(f"{sum(results['rejects'].values())} rejected, listed in rejects.parquet:")
        lines += [f"  {count} x {reason}" for reason, count in Counter(results["rejects"]).most_common()]
    return "\n".join(lines)
