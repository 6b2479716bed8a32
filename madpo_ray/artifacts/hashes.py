"""Hashes and sizes of files: what tells a complete copy from another one."""

import functools
import hashlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
THREADS = 8

FileEntry = dict[str, Any]  # `sha256` and `size` (bytes) of a file


def hash_file(path: Path) -> str:
    """SHA-256 of a file's content, in hex. Cached per process by size and time of change."""
    stat = path.stat()
    return _cached_hash(path, stat.st_size, stat.st_mtime_ns)


@functools.cache
def _cached_hash(path: Path, size: int, mtime_ns: int) -> str:
    return read_hash(path)


def read_hash(path: Path) -> str:
    """`hash_file` without the cache: what is on the disk now."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def files_below(folder: Path) -> list[Path]:
    """Every file below a folder, sorted, without its manifest."""
    return sorted(
        path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST
    )


class HashingWriter:
    """A new file that is hashed while it is written, in one go from its beginning."""

    def __init__(self, path: Path) -> None:
        self._stream = path.open("wb")
        self._hash = hashlib.sha256()
        self._size = 0

    def write(self, data: bytes | memoryview) -> int:
        view = memoryview(data)
        self._hash.update(view)
        self._stream.write(view)
        self._size += view.nbytes
        return view.nbytes

    def flush(self) -> None:
        self._stream.flush()

    def close(self) -> FileEntry:
        """Closes the file; its entry, as `describe_files` gives it."""
        self._stream.close()
        return {"sha256": self._hash.hexdigest(), "size": self._size}


def describe_files(folder: Path) -> dict[str, FileEntry]:
    """`sha256` and `size` (bytes) of every file below a folder, by relative path."""
    return {
        str(path.relative_to(folder)): {"sha256": hash_file(path), "size": path.stat().st_size}
        for path in files_below(folder)
    }


def damaged_files(
    folder: Path, files: Mapping[str, Mapping[str, Any]], *, compare_hashes: bool = False
) -> list[str]:
    """What differs from `describe_files` of earlier: one phrase per file. Empty if nothing does.

    Args:
        compare_hashes: read all files. Otherwise only their sizes are compared.
    """

    def check(item: tuple[str, Mapping[str, Any]]) -> str:
        name, entry = item
        return _damage(folder, name, entry, compare_hash=compare_hashes)

    with ThreadPoolExecutor(THREADS) as pool:  # hashing releases the interpreter
        return [found for found in pool.map(check, files.items()) if found]


def _damage(folder: Path, name: str, entry: Mapping[str, Any], *, compare_hash: bool) -> str:
    """What differs, or an empty string."""
    path = folder / name
    try:
        size = path.stat().st_size
        if size != entry["size"]:
            return f"{name} has {size} bytes instead of {entry['size']}"
        if compare_hash and read_hash(path) != entry["sha256"]:
            return f"{name} has different content"
    except FileNotFoundError:
        return f"{name} is missing"
    except (KeyError, TypeError):
        return f"{name} has no size in the manifest"
    except OSError as error:
        return f"{name} cannot be read ({error.strerror})"
    return ""
