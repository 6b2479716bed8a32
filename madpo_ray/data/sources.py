"""The files of preference pairs that a config names, and `open_source` as their only door."""

import glob
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from madpo_ray.data.rows import Source
from madpo_ray.data.table_sources import ArrowSource, ParquetSource
from madpo_ray.data.text_sources import CSVSource, JSONLinesSource, JSONSource
from madpo_ray.errors import UserError

KINDS = (ParquetSource, ArrowSource, JSONLinesSource, JSONSource, CSVSource)
SUFFIXES = tuple(suffix for kind in KINDS for suffix in kind.suffixes)


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
            real = os.path.realpath(file)
            if real in first:
                raise UserError(f"data.files: {file} and {first[real]} are one file: list it once")
            first[real] = file
            files.append(file)
    return files


def _files_of(name: str) -> Iterator[str]:
    path = Path(name)
    if path.is_file():
        yield name
    elif path.is_dir():
        yield from map(str, _files_in(path))
    elif glob.has_magic(name):
        found = sorted(file for file in glob.glob(name, recursive=True) if os.path.isfile(file))
        if not found:
            raise UserError(f"data.files: no file matches {name}")
        yield from found
    else:
        raise UserError(f"data.files: {path} does not exist")


def _files_in(folder: Path) -> list[Path]:
    if (folder / "dataset_dict.json").is_file():
        raise UserError(f"data.files: {folder} holds several data sets: name one of its folders")
    if (folder / "state.json").is_file():  # of `datasets.save_to_disk`
        try:
            state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
            return [folder / str(file["filename"]) for file in state["_data_files"]]
        except (ValueError, KeyError, TypeError):
            raise UserError(f"data.files: {folder / 'state.json'} cannot be read") from None
    found = [
        path
        for path in sorted(folder.iterdir())
        if path.is_file() and path.name.lower().endswith(SUFFIXES) and path.name[0] not in "._"
    ]
    if not found:
        raise UserError(f"data.files: {folder} holds no file that ends in {_known()}")
    return found


def open_source(name: str) -> Source:
    """The source of a file.

    Raises:
        UserError: it is missing or of an unknown kind.
    """
    path = Path(name)
    if not path.is_file():
        raise UserError(f"data.files: {path} does not exist")
    for kind in KINDS:
        if path.name.lower().endswith(kind.suffixes):
            return kind(path)
    raise UserError(f"data.files: {path.name} must end in {_known()}")


def _known() -> str:
    plain = [suffix for suffix in SUFFIXES if suffix.count(".") == 1]
    return f"{', '.join(plain[:-1])} or {plain[-1]} (text also with .gz or .zst)"
