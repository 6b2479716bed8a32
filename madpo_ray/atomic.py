"""Files that are written completely or not at all, and that survive a power loss."""

import csv
import errno
import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# What file systems answer that cannot sync a folder.
NO_FSYNC = {errno.EINVAL, errno.ENOTSUP}


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file. Raises ValueError for NaN and infinity, which JSON does not have."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes a UTF-8 text file."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8", newline="")
    replace_file(partial, path)


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes one line per row, below a header with the keys of all rows."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, names)
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def replace_file(partial: Path, path: Path) -> None:
    """Moves a complete file into its place."""
    sync(partial)
    os.replace(partial, path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Waits until a file's content, or a folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NO_FSYNC:
            raise
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """`sync` for every file and folder below a folder, and for itself. Links are not followed."""
    for parent, _, names in os.walk(folder):
        for name in names:
            file = Path(parent, name)
            if not file.is_symlink():
                sync(file)
        sync(Path(parent))
