"""A stage's folder: what it was made from, the hashes of its files, and a manifest written last.

A stage is finished when `manifest.json` exists. It is built in a folder next to its place and moved
there when it is complete, so a stage that is redone keeps its old result until then.
"""

import contextlib
import fcntl
import functools
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import madpo_ray
from madpo_ray.atomic import write_json
from madpo_ray.errors import UserError

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Inputs:
    """What an artifact is made from.

    `settings` come from the config; `upstream` are fingerprints of the artifacts that it reads;
    `content` is what the config points to (hashes of files).
    """

    stage: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    upstream: Mapping[str, str] = field(default_factory=dict)
    content: Mapping[str, Any] = field(default_factory=dict)

    @property
    def parts(self) -> dict[str, Any]:
        return {
            "package": {"madpo_ray": madpo_ray.__version__},
            "settings": dict(self.settings),
            "upstream": dict(self.upstream),
            "content": dict(self.content),
        }

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(json.dumps(self.parts, sort_keys=True).encode()).hexdigest()


class Difference(NamedTuple):
    """One value that a finished artifact was made from, and what it would be now."""

    part: str  # package, settings, upstream or content
    key: str
    old: Any
    new: Any

    def __str__(self) -> str:
        return f"{self.part}.{self.key}: {_short(self.old)} -> {_short(self.new)}"


def model_folder(artifact: Path) -> Path:
    """Where a training's folder keeps its model."""
    return artifact / "model"


def hash_file(path: Path) -> str:
    """SHA-256 of a file's content, in hex. Cached per process by size and time of change."""
    stat = path.stat()
    return _hash_file(path, stat.st_size, stat.st_mtime_ns)


@functools.cache
def _hash_file(path: Path, size: int, mtime_ns: int) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def hash_files(folder: Path) -> dict[str, str]:
    """SHA-256 of every file under a folder, by relative path, without the manifest."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        str(path.relative_to(folder)): hash_file(path)
        for path in files
        if path != folder / MANIFEST
    }


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a finished artifact, or None. A damaged one counts as none."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except FileNotFoundError:
        return None
    except (ValueError, OSError) as error:
        logger.warning("%s cannot be read and counts as missing: %s", folder / MANIFEST, error)
        return None
    parts = ("inputs", "results", "files")
    if not isinstance(manifest, dict) or not all(
        isinstance(manifest.get(part), dict) for part in parts
    ):
        logger.warning("%s is not a manifest and counts as missing", folder / MANIFEST)
        return None
    return manifest


def differences(folder: Path, inputs: Inputs) -> list[Difference]:
    """What differs between a finished artifact's inputs and `inputs`. Empty if they agree.

    An artifact of another version of this package differs by that version only: its other values
    may have another meaning.

    Raises:
        FileNotFoundError: there is no finished artifact.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        raise FileNotFoundError(f"{folder} is not finished")
    old = manifest["inputs"]
    new = json.loads(json.dumps(inputs.parts))

    older = old.get("content", {}).get("madpo_ray")  # of 0.1.0
    old_version = old.get("package", {}).get("madpo_ray", older)
    if old_version != madpo_ray.__version__:
        return [Difference("package", "madpo_ray", old_version, madpo_ray.__version__)]

    found = []
    for part in new:
        old_values = _flat(old.get(part, {}))
        new_values = _flat(new[part])
        for key in sorted(old_values.keys() | new_values.keys()):
            if old_values.get(key) != new_values.get(key):
                found.append(Difference(part, key, old_values.get(key), new_values.get(key)))
    return found


def is_finished(folder: Path, inputs: Inputs) -> bool:
    """Whether an artifact is there and was made from these inputs."""
    return read_manifest(folder) is not None and not differences(folder, inputs)


def require(folder: Path, inputs: Inputs) -> dict[str, Any]:
    """The manifest of a finished artifact that another stage reads.

    Raises:
        UserError: it is missing, was made from other inputs (naming them), or lost a file.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        raise UserError(
            f"{folder} does not exist yet: run `madpo-ray {inputs.stage}` first, or `madpo-ray run`"
        )

    # Made from what it would be made from now?
    if found := differences(folder, inputs):
        raise UserError(
            f"{folder} was made from other inputs:\n  "
            + "\n  ".join(map(str, found))
            + f"\nrun `madpo-ray {inputs.stage}` with this config first, or `madpo-ray run`, "
            "or set another run.name"
        )

    # And complete?
    missing = [name for name in manifest["files"] if not (folder / name).exists()]
    if missing:
        raise UserError(
            f"{folder} lost {', '.join(missing)}: delete the folder and run "
            f"`madpo-ray {inputs.stage}`"
        )
    return manifest


def refuse_changed_content(folder: Path, inputs: Inputs) -> None:
    """Raises UserError if what the config points to changed and the config did not.

    Redoing the stage then would replace results that nobody asked to replace.
    """
    found = differences(folder, inputs)
    if all(difference.part in ("package", "content") for difference in found):
        raise UserError(
            f"{folder} was made from other inputs by the same config:\n  "
            + "\n  ".join(map(str, found))
            + "\nset another run.name, or delete the folder to make it again"
        )


@contextlib.contextmanager
def building(folder: Path, inputs: Inputs) -> Iterator[tuple[Path, dict[str, Any]]]:
    """A fresh folder to build an artifact in, and a dict for its results.

    On success the manifest is written and the folder moved into place.

    Raises:
        UserError: another process is building the same artifact.
    """
    with _build_lock(folder):
        partial = folder.with_name(folder.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)

        results: dict[str, Any] = {}
        yield partial, results

        # The manifest is the last file, and the move the last step.
        manifest = {
            "stage": inputs.stage,
            "fingerprint": inputs.fingerprint,
            "inputs": inputs.parts,
            "results": results,
            "files": hash_files(partial),
        }
        write_json(partial / MANIFEST, manifest)
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)


@contextlib.contextmanager
def _build_lock(folder: Path) -> Iterator[None]:
    """Holds a lock that ends with this process, however it ends."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_name(f".{folder.name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"another process is making {folder}: wait for it, or set another run.name"
            ) from None
        yield


def check_writable(folder: Path) -> None:
    """Raises UserError if the run's folder cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".write-test-{os.getpid()}"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"cannot write to the run's folder {folder}: {error.strerror}; set run.storage_path"
        ) from None


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted keys."""
    if not isinstance(value, dict):
        return {prefix: value}
    flat = {}
    for name, part in value.items():
        flat.update(_flat(part, f"{prefix}.{name}" if prefix else name))
    return flat


def _short(value: Any) -> str:
    """A value for a message; hashes are cut to 12 characters."""
    text = "none" if value is None else str(value)
    is_hash = len(text) == 64 and " " not in text
    return text[:12] + "…" if is_hash else text
