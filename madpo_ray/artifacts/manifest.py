"""A stage's manifest: what it was made from, its results, and its files with size and hash.

It is written last: a stage is finished when its manifest and every file in it are there.
"""

import hashlib
import importlib.metadata
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import madpo_ray
from madpo_ray.artifacts.hashes import MANIFEST, damaged_files
from madpo_ray.errors import UserError

logger = logging.getLogger(__name__)

# Their versions are recorded: with others, the same inputs may give slightly other numbers.
LIBRARIES = ("torch", "transformers", "peft", "deepspeed", "ray")


@dataclass(frozen=True)
class Inputs:
    """What an artifact is made from.

    `settings` come from the config; `upstream` are fingerprints of the artifacts that it reads;
    `content` is what the config points to (hashes of files), and `names` are the paths where that
    was found. They are not part of the fingerprint: a folder may be moved, or mounted elsewhere.
    """

    stage: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    upstream: Mapping[str, str] = field(default_factory=dict)
    content: Mapping[str, Any] = field(default_factory=dict)
    names: Mapping[str, Any] = field(default_factory=dict)

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


def library_versions() -> dict[str, str]:
    """The installed versions of the libraries that decide numbers."""
    return {name: importlib.metadata.version(name) for name in LIBRARIES}


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a finished artifact, or None. A damaged one counts as none."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, OSError) as error:
        logger.warning("%s cannot be read and counts as missing: %s", folder / MANIFEST, error)
        return None
    if not _is_manifest(manifest):
        logger.warning("%s is not a manifest and counts as missing", folder / MANIFEST)
        return None
    found: dict[str, Any] = manifest
    return found


def _finished_manifest(folder: Path) -> dict[str, Any]:
    """Raises FileNotFoundError if there is no finished artifact."""
    manifest = read_manifest(folder)
    if manifest is None:
        raise FileNotFoundError(f"{folder} is not finished")
    return manifest


def _is_manifest(manifest: Any) -> bool:
    parts = ("inputs", "results", "files")
    if not isinstance(manifest, dict):
        return False
    if not all(isinstance(manifest.get(part), dict) for part in parts):
        return False
    return all(isinstance(values, dict) for values in manifest["inputs"].values())


def differences(folder: Path, inputs: Inputs) -> list[Difference]:
    """What differs between a finished artifact's inputs and `inputs`. Empty if they agree.

    An artifact of another version of this package differs by that version only: its other values
    may have another meaning.

    Raises:
        FileNotFoundError: there is no finished artifact.
    """
    return compare_inputs(_finished_manifest(folder)["inputs"], inputs.parts)


def compare_inputs(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Difference]:
    """What differs between two `Inputs.parts`, as `differences` does."""
    new = json.loads(json.dumps(new))
    old_version = old.get("package", {}).get("madpo_ray")
    if old_version != madpo_ray.__version__:
        return [Difference("package", "madpo_ray", old_version, madpo_ray.__version__)]

    found = []
    for part in new:
        old_values = flat(old.get(part, {}))
        new_values = flat(new[part])
        for key in sorted(old_values.keys() | new_values.keys()):
            if old_values.get(key) != new_values.get(key):
                found.append(Difference(part, key, old_values.get(key), new_values.get(key)))
    return found


def damage(folder: Path, *, compare_hashes: bool = False) -> list[str]:
    """What a finished artifact has lost since its manifest was written: one phrase per file.

    Raises:
        FileNotFoundError: there is no finished artifact.
    """
    files = _finished_manifest(folder)["files"]
    return damaged_files(folder, files, compare_hashes=compare_hashes)


def changed_since(run: Path, upstream: Mapping[str, str]) -> list[str]:
    """Those results that were made again since another was made from them, by fingerprint."""
    manifests = {name: read_manifest(run / name) for name in upstream}
    return [
        name
        for name, manifest in manifests.items()
        if manifest is not None and manifest["fingerprint"] != upstream[name]
    ]


def is_finished(folder: Path, inputs: Inputs) -> bool:
    """Whether an artifact is there, complete, and was made from these inputs."""
    manifest = read_manifest(folder)
    if manifest is None or compare_inputs(manifest["inputs"], inputs.parts):
        return False
    return not damaged_files(folder, manifest["files"])


def require(folder: Path, inputs: Inputs) -> dict[str, Any]:
    """The manifest of a finished artifact that another stage reads.

    Raises:
        UserError: it is missing, was made from other inputs (naming them), or a file is missing or
            has another size.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        raise UserError(
            f"{folder} does not exist yet: run `madpo-ray run --until {inputs.stage}` first"
        )

    # Made from what it would be made from now?
    if found := compare_inputs(manifest["inputs"], inputs.parts):
        raise UserError(
            f"{folder} was made from other inputs:\n  "
            + "\n  ".join(map(str, found))
            + f"\nrun `madpo-ray run --until {inputs.stage}` with this config first, or set "
            "another run.name"
        )

    # And complete?
    if lost := damaged_files(folder, manifest["files"]):
        raise UserError(
            f"{folder} is damaged: {'; '.join(lost)}. Run `madpo-ray run --until "
            f"{inputs.stage}` to make it again"
        )
    return manifest


def refuse_changed_content(folder: Path, inputs: Inputs) -> None:
    """Raises UserError if the config is unchanged, but what it points to, or the package, is not.

    Redoing the stage then would replace results that nobody asked to replace.
    """
    manifest = _finished_manifest(folder)
    found = compare_inputs(manifest["inputs"], inputs.parts)
    parts = {difference.part for difference in found}
    is_same_config = manifest.get("names") == dict(inputs.names) and parts <= {"content"}
    if found and (is_same_config or parts == {"package"}):
        raise UserError(
            f"{folder} was made from other inputs by the same config:\n  "
            + "\n  ".join(map(str, found))
            + "\nset another run.name, or delete the folder to make it again"
        )


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted keys."""
    if not isinstance(value, dict):
        return {prefix: value}
    found = {}
    for name, part in value.items():
        found.update(flat(part, f"{prefix}.{name}" if prefix else name))
    return found


def _short(value: Any) -> str:
    """A value for a message; hashes are cut to 12 characters."""
    text = "none" if value is None else str(value)
    is_hash = len(text) == 64 and " " not in text
    return text[:12] + "…" if is_hash else text
