"""The files of preference pairs that a config names, and `open_source` as their only door."""

import csv
import functools
import glob
import json
import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow.fs
from fsspec.implementations.arrow import ArrowFSWrapper

from madpo_ray.config import is_remote
from madpo_ray.data.files import DataFile, Source, StoreUri, explaining
from madpo_ray.data.table_sources import ArrowSource, ParquetSource
from madpo_ray.data.text_sources import UNPACK_ERRORS, CSVSource, JSONLinesSource, JSONSource
from madpo_ray.errors import UserError

if TYPE_CHECKING:
    from datasets import DatasetBuilder

logger = logging.getLogger(__name__)

HUB = "hf://datasets/"
# A data set, perhaps at a revision; no file or folder in it.
HUB_DATASET = re.compile(re.escape(HUB) + r"[^/@]+/[^/@]+(@(refs/(pr|convert)/)?[^/]+)?")

KINDS = (ParquetSource, ArrowSource, JSONLinesSource, JSONSource, CSVSource)
SUFFIXES = tuple(suffix for kind in KINDS for suffix in kind.suffixes)

# Of files in a folder, which would be left out.
OTHER_COMPRESSIONS = (".bz2", ".xz", ".zip", ".lz4", ".7z")


def list_files(names: Sequence[str]) -> list[str]:
    """The files of `data.files`: a folder or a pattern stands for its files, sorted by name.

    A folder that `datasets.save_to_disk` wrote stands for its Arrow files in their order.

    Raises:
        UserError: a name stands for no file, or two for the same.
    """
    first: dict[str, str] = {}
    files = []
    for name in names:
        for file in _files_of(name):
            real = file if is_remote(file) else os.path.realpath(file)
            if real in first:
                raise UserError(f"data.files: {file} and {first[real]} are one file: list it once")
            first[real] = file
            files.append(file)
    return files


def _files_of(name: str) -> Iterator[str]:
    path = Path(name)
    if is_remote(name):
        yield from _remote_files(name)
    elif path.is_file():
        yield name
    elif path.is_dir():
        yield from map(str, _files_in(path))
    elif glob.has_magic(name):
        found = sorted(file for file in glob.glob(name, recursive=True) if _is_file(file))
        if not found:
            raise UserError(f"data.files: no file matches {name}")
        yield from found
    else:
        raise UserError(f"data.files: {path} does not exist")


def _files_in(folder: Path) -> list[Path]:
    names = sorted(path.name for path in folder.iterdir())
    saved = _saved_files(names, lambda name: (folder / name).read_bytes(), str(folder))
    if saved is not None:
        return [folder / name for name in saved]
    found = [folder / name for name in names if _is_data(name) and _is_file(folder / name)]
    _require_known_compressions(names, str(folder))
    if not found:
        raise UserError(f"data.files: {folder} holds no file that ends in {_known()}")
    _warn_of_subfolders(folder)
    return found


@functools.cache  # files are listed again and again
def _warn_of_subfolders(folder: Path) -> None:
    below = sorted(path for path in folder.glob("*/*") if _is_data(path.name))
    if below:
        logger.warning(
            "data.files: %s: files in its subfolders are not read, such as %s; %s/**/* would",
            folder,
            below[0],
            folder,
        )


def _require_known_compressions(names: Sequence[str], folder: str) -> None:
    """Raises UserError for data that would be left out because of how it is compressed."""
    for name in names:
        stem, compression = os.path.splitext(name)
        if compression.lower() in OTHER_COMPRESSIONS and _is_data(stem):
            raise UserError(
                f"data.files: {folder}/{name}: {compression} is not read: compress it with gzip or "
                "zstd, or move it elsewhere"
            )


def _is_file(path: str | Path) -> bool:
    """Raises UserError for a link to nothing: its rows would be missing unnoticed."""
    if os.path.islink(path) and not os.path.exists(path):
        raise UserError(f"data.files: {path} is a link to nothing: fetch its file, or remove it")
    return os.path.isfile(path)


def _saved_files(
    names: Sequence[str], read: Callable[[str], bytes], folder: str
) -> list[str] | None:
    """The Arrow files of what `datasets.save_to_disk` wrote, in order; None if it did not.

    Args:
        names: of the files in the folder.
        read: gives the content of one.
    """
    if "dataset_dict.json" in names:
        raise UserError(f"data.files: {folder} holds several data sets: name one of its folders")
    if "state.json" not in names:
        return None
    try:
        state = json.loads(read("state.json"))
        return [str(file["filename"]) for file in state["_data_files"]]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"data.files: {folder}/state.json cannot be read") from None


def _remote_files(name: str) -> list[str]:
    """The same in a store."""
    place = StoreUri.of(name)
    with explaining(name):
        if HUB_DATASET.fullmatch(name):
            return _training_files(name)

        # A file, whose name may look like a pattern.
        info = place.system.get_file_info(place.path)
        if info.is_file:
            return [name]

        # A pattern.
        if glob.has_magic(place.path):
            # fsspec's patterns: the standard library's are those of local files.
            matches = ArrowFSWrapper(place.system).glob(place.path, detail=True)
            files = sorted(path for path, info in matches.items() if info["type"] == "file")
            if not files:
                raise UserError(f"data.files: no file matches {name}")
            return [place.uri(path) for path in files]

        # A folder, or nothing.
        if info.type is pyarrow.fs.FileType.NotFound:
            raise UserError(f"data.files: {name} does not exist")
        below = place.system.get_file_info(pyarrow.fs.FileSelector(place.path))
        folder = place.path.rstrip("/")
        names = sorted(one.base_name for one in below if one.is_file)
        found = _saved_files(names, lambda one: _read(place, f"{folder}/{one}"), name)
        if found is None:
            found = [one for one in names if _is_data(one)]
            _require_known_compressions(names, name)
        if not found:
            raise UserError(f"data.files: {name} holds no file that ends in {_known()}")
        return [place.uri(f"{folder}/{one}") for one in found]


@functools.cache
def _training_files(name: str) -> list[str]:
    """Those of a hub data set's split train, as its card or the names of its files tell.

    Their names hold the commit: a branch that moves on changes nothing in this process.
    """
    from datasets import load_dataset_builder

    # With its prefix a name is never that of a folder here.
    repository, _, revision = name.partition("@")
    files = files_of_train(load_dataset_builder(repository, revision=revision or None), name)
    logger.info("%s is read from the hub: %d files of its split train", name, len(files))
    return files


def files_of_train(builder: "DatasetBuilder", name: str) -> list[str]:
    """The files of split train of what `datasets` found. Raises UserError if there is none."""
    files = builder.config.data_files or {}
    if "train" not in files:
        some = f", such as {next(iter(files.values()))[0]}" if files else ""
        raise UserError(
            f"data.files: {name} has no split train (its splits: {', '.join(files) or 'none'}): "
            f"give files of it{some}"
        )
    return [str(file) for file in files["train"]]


def _read(place: StoreUri, path: str) -> bytes:
    with place.system.open_input_stream(path) as stream:
        return bytes(stream.read())


def _is_data(name: str) -> bool:
    return name.lower().endswith(SUFFIXES) and name[0] not in "._"


def open_source(name: str) -> Source:
    """The source of a file.

    Raises:
        UserError: it is missing or of an unknown kind.
    """
    file = DataFile(name)
    if not file.exists():
        raise UserError(f"data.files: {name} does not exist")
    for kind in KINDS:
        if file.ends_with(kind.suffixes):
            return kind(file)
    raise UserError(f"data.files: {os.path.basename(file.path)} must end in {_known()}")


def bound_rows(name: str) -> int:
    """An upper bound of a file's rows. Raises UserError if it cannot be read."""
    try:
        return open_source(name).count()
    except (*UNPACK_ERRORS, csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"data.files: {name} cannot be read: {error}") from None


def _known() -> str:
    plain = [suffix for suffix in SUFFIXES if suffix.count(".") == 1]
    return f"{', '.join(plain[:-1])} or {plain[-1]} (text also with .gz or .zst)"
