"""Building a stage's folder: next to its place, and moved there when it is complete.

At every moment one complete result is on the disk under a name that `recover` knows: the old one
until the new one is written and synced, then the new one.
"""

import contextlib
import logging
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from madpo_ray.artifacts.hashes import MANIFEST, describe_files
from madpo_ray.artifacts.manifest import Inputs, is_finished, library_versions, read_manifest
from madpo_ray.atomic import sync, sync_tree, write_json
from madpo_ray.errors import UserError

logger = logging.getLogger(__name__)

# Stages, trainings and checkpoints of a run.
CHECKED_FOLDERS = ("*/", "ray/*/", "ray/*/checkpoint_*/")


@contextlib.contextmanager
def building(
    folder: Path, inputs: Inputs, *, confirm: Callable[[], None] = lambda: None
) -> Iterator[tuple[Path, dict[str, Any]]]:
    """A fresh folder to build an artifact in, and a dict for its results.

    On success the manifest is written and the folder moved into place. Only the holder of the run's
    lock may build.

    Args:
        confirm: called after the block; if it raises, the old result stays.
    """
    place = _place(folder)
    partial = _partial(place)
    discard(partial)
    partial.mkdir(parents=True)

    began = time.monotonic()
    results: dict[str, Any] = {}
    yield partial, results
    confirm()

    # The manifest is the last file, and the move the last step.
    manifest = {
        "stage": inputs.stage,
        "fingerprint": inputs.fingerprint,
        "inputs": inputs.parts,
        "names": dict(inputs.names),
        "versions": library_versions(),
        "results": results,
        "seconds": round(time.monotonic() - began, 1),
        "files": describe_files(partial),
    }
    sync_tree(partial)
    write_json(partial / MANIFEST, manifest)
    _swap(partial, place)


def recover(folder: Path, inputs: Inputs) -> None:
    """Finishes, or undoes, a move that a kill interrupted. Only for the holder of the run's lock.

    A complete new result is moved into place if it is of `inputs` and the present one is not. If
    there is no present one, the old result is put back.
    """
    place = _place(folder)
    partial = _partial(place)
    old = _old(place)
    if is_finished(partial, inputs) and not is_finished(place, inputs):
        _swap(partial, place)
    elif not place.exists() and read_manifest(old) is not None:
        old.rename(place)
    if read_manifest(place) is not None:
        discard(old)
    if is_finished(place, inputs):
        discard(partial)


def has_leftovers(folder: Path) -> bool:
    """Whether a kill left something next to an artifact that `recover` finishes or deletes."""
    place = _place(folder)
    names = (_partial(place), _old(place))
    return any(os.path.lexists(name) for name in names) or any(_trash_in(place.parent))


def discard(path: Path) -> None:
    """Frees a name at once, then deletes what had it, and what earlier calls left.

    Files that cannot be deleted (NFS keeps those that are open somewhere) stay under another name,
    with a warning, until the next call for any name of the same folder.
    """
    if os.path.lexists(path):
        path.rename(_unused(path))
    for trash in _trash_in(path.parent):
        try:
            if trash.is_symlink() or trash.is_file():  # what a link leads to is not ours
                trash.unlink()
                continue
            (trash / MANIFEST).unlink(missing_ok=True)  # so that no part of it looks complete
            shutil.rmtree(trash)
        except OSError as error:
            logger.warning("%s is not needed and cannot be deleted: %s", trash, error)


def check_writable(folder: Path) -> None:
    """Raises UserError if the run's folder cannot be written, or made. Makes nothing."""
    try:
        existing = next(path for path in (folder, *folder.parents) if path.exists())
        with tempfile.NamedTemporaryFile(dir=existing, prefix=".write-test-"):
            pass
    except OSError as error:
        raise UserError(
            f"cannot write to the run's folder {folder}: {error.strerror}; set run.storage_path"
        ) from None


def check_trusted(folder: Path) -> None:
    """Raises UserError if everyone can write a folder of the run, or another user owns one.

    Checkpoints there can run code. Write access for the group is allowed, and root may use the runs
    of others.
    """
    user = os.geteuid()
    below = [path for pattern in CHECKED_FOLDERS for path in folder.glob(pattern)]
    for path in (folder, *below):
        try:
            status = path.stat()
        except FileNotFoundError:  # not there yet, or deleted meanwhile
            continue
        if status.st_mode & stat.S_IWOTH:
            raise UserError(
                f"everyone can write to {path}, and checkpoints there can run code: run "
                f"`chmod -R o-w {folder}`"
            )
        if user != 0 and status.st_uid not in (0, user):
            raise UserError(
                f"{path} belongs to another user, and checkpoints there can run code: copy the "
                "run, or set another run.name"
            )


def _swap(partial: Path, place: Path) -> None:
    """Moves a complete folder into its place, and the old one aside and away."""
    old = _old(place)
    if place.exists():
        discard(old)
        place.rename(old)
    partial.rename(place)
    sync(place.parent)
    discard(old)


def _place(folder: Path) -> Path:
    """Where a stage's folder really is: it may be a link to another disk."""
    return folder.resolve() if folder.is_symlink() else folder


def _partial(place: Path) -> Path:
    return place.with_name(place.name + ".partial")


def _old(place: Path) -> Path:
    return place.with_name(place.name + ".old")


def _unused(path: Path) -> Path:
    number = 0
    while os.path.lexists(trash := path.with_name(f".{path.name}.trash-{number}")):
        number += 1
    return trash


def _trash_in(folder: Path) -> list[Path]:
    return list(folder.glob(".*.trash-*"))
