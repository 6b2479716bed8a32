"""A stage's folder: what it was made from, its files' hashes, and a manifest written last.

A stage is finished when `manifest.json` exists. It is built in a folder beside its place and moved there whole, so a
stage that is redone keeps its old result until the new one is complete.
"""

import contextlib
import fcntl
import functools
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import madpo_ray
from madpo_ray.config import UserError

MANIFEST = "manifest.json"
Parts = Mapping[str, Any]


@dataclass(frozen=True)
class Inputs:
    """What a stage is made from.

    `settings` come from the config, `content` is what the config points to (hashes of files, the package's version).
    """

    stage: str
    settings: Parts
    content: Parts = field(default_factory=dict)

    @property
    def parts(self) -> dict[str, Any]:
        return {
            "settings": dict(self.settings),
            "content": {**self.content, "madpo_ray": madpo_ray.__version__},
        }

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(json.dumps(self.parts, sort_keys=True).encode()).hexdigest()

    @property
    def experiment(self) -> str:
        """The name of this stage's run in Ray's storage: the same inputs go on where they were."""
        return f"{self.stage}-{self.fingerprint[:16]}"


def hash_file(path: Path) -> str:
    """SHA-256 of a file's content, in hex; read once per process while size and time of change stay."""
    stat = path.stat()
    return _hash_file(path, stat.st_size, stat.st_mtime_ns)


@functools.cache
def _hash_file(path: Path, size: int, mtime_ns: int) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def hash_files(folder: Path) -> dict[str, str]:
    """SHA-256 of every file under a folder, by relative path, the manifest aside."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST)
    return {str(path.relative_to(folder)): hash_file(path) for path in files}


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a finished stage, or None."""
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
    except FileNotFoundError:
        return None
    return manifest


def differences(folder: Path, inputs: Inputs) -> list[str]:
    """What differs between a finished stage's inputs and `inputs`, one line each; empty where it fits."""
    manifest = read_manifest(folder)
    if manifest is None:
        return ["it is not there yet"]
    old, new = _flat(manifest["inputs"]), _flat(json.loads(json.dumps(inputs.parts)))
    return [
        f"{key}: {_short(old.get(key))} -> {_short(new.get(key))}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]


def is_finished(folder: Path, inputs: Inputs) -> bool:
    return not differences(folder, inputs)


def require(folder: Path, inputs: Inputs) -> dict[str, Any]:
    """The manifest of a finished stage that another stage builds on.

    Raises:
        UserError: it is missing, was made from other inputs (naming them), or lost a file.
    """
    differs = differences(folder, inputs)
    manifest = read_manifest(folder)
    if manifest is None:
        raise UserError(f"{folder} is not there yet: run `madpo-ray {inputs.stage}` first, or `madpo-ray run`")
    if differs:
        raise UserError(
            f"{folder} was made from other inputs:\n  "
            + "\n  ".join(differs)
            + f"\nrun `madpo-ray {inputs.stage}` again "
            "with this config, or `madpo-ray run`, or give another run.name"
        )
    missing = [name for name in manifest["files"] if not (folder / name).exists()]
    if missing:
        raise UserError(f"{folder} lacks {', '.join(missing)}: delete the folder and run `madpo-ray {inputs.stage}`")
    return manifest


@contextlib.contextmanager
def building(folder: Path, inputs: Inputs) -> Iterator[tuple[Path, dict[str, Any]]]:
    """A fresh folder to build a stage in, and a dict for the manifest's `results`; moved into place on success.

    Raises:
        UserError: another process is building it.
    """
    with _alone(folder):
        partial = folder.with_name(folder.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        results: dict[str, Any] = {}
        yield partial, results
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
def _alone(folder: Path) -> Iterator[None]:
    """Holds a lock that ends with this process, however it ends."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_name(f".{folder.name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"another process is making {folder}: wait for it to end, or give another run.name"
            ) from None
        yield


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """A file written whole or not at all."""
    scratch = path.with_name(path.name + ".partial")
    scratch.write_text(text)
    os.replace(scratch, path)


def check_writable(folder: Path) -> None:
    """Raises UserError where the run's folder cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".write-test-{os.getpid()}"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise UserError(f"cannot write to the run's folder {folder}: {error.strerror}; set run.storage_path") from None


def _flat(parts: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(parts, dict):
        return {prefix: parts}
    return {
        key: value
        for name, part in parts.items()
        for key, value in _flat(part, f"{prefix}.{name}" if prefix else name).items()
    }


def _short(value: Any) -> str:
    text = "none" if value is None else str(value)
    return text[:12] + "…" if len(text) == 64 and " " not in text else text
