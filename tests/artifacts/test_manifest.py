"""Artifacts: finished or not, made from what, and never half overwritten."""

from pathlib import Path

import pytest

from madpo_ray.artifacts.building import building, check_writable
from madpo_ray.artifacts.hashes import hash_file
from madpo_ray.artifacts.manifest import (
    Difference,
    Inputs,
    damage,
    differences,
    is_finished,
    refuse_changed_content,
    require,
)
from madpo_ray.errors import UserError

INPUTS = Inputs(
    "pairs",
    settings={"seed": 0, "data": {"max_length": 64}},
    upstream={"model": "1" * 64},
    content={"files": {"a.jsonl": "0" * 64}},
)


def build(folder: Path, inputs: Inputs = INPUTS, text: str = "x") -> None:
    with building(folder, inputs) as (partial, results):
        (partial / "file.txt").write_text(text)
        results["count"] = 1


def test_is_finished_with_its_manifest(tmp_path: Path) -> None:
    folder = tmp_path / "pairs"
    assert not is_finished(folder, INPUTS)
    with pytest.raises(UserError, match="run `madpo-ray run --until pairs` first"):
        require(folder, INPUTS)
    build(folder)
    assert is_finished(folder, INPUTS)
    assert require(folder, INPUTS)["results"] == {"count": 1}
    entry = {"sha256": hash_file(folder / "file.txt"), "size": 1}
    assert require(folder, INPUTS)["files"] == {"file.txt": entry}


@pytest.mark.parametrize("text", ["", "{", "[]", '{"inputs": 1}'])
def test_damaged_manifest_counts_as_missing(text: str, tmp_path: Path) -> None:
    folder = tmp_path / "pairs"
    build(folder)
    (folder / "manifest.json").write_text(text)
    assert not is_finished(folder, INPUTS)
    build(folder)
    assert is_finished(folder, INPUTS)


def test_other_inputs_are_named(tmp_path: Path) -> None:
    build(tmp_path / "pairs")
    changed = Inputs(
        "pairs",
        settings={"seed": 0, "data": {"max_length": 128}},
        upstream={"model": "1" * 64},
        content={"files": {"a.jsonl": "1" * 64}},
    )
    found = differences(tmp_path / "pairs", changed)
    assert [str(difference) for difference in found] == [
        "settings.data.max_length: 64 -> 128",
        "content.files.a.jsonl: 000000000000… -> 111111111111…",
    ]
    with pytest.raises(UserError, match=r"settings\.data\.max_length: 64 -> 128"):
        require(tmp_path / "pairs", changed)


@pytest.mark.parametrize("part", ["settings", "upstream", "content"])
def test_every_part_is_in_the_fingerprint(part: str) -> None:
    parts = {"settings": INPUTS.settings, "upstream": INPUTS.upstream, "content": INPUTS.content}
    assert Inputs("pairs", **parts) == INPUTS
    changed = Inputs("pairs", **{**parts, part: {"other": "value"}})
    assert changed.fingerprint != INPUTS.fingerprint


def test_another_version_is_the_only_difference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(tmp_path / "pairs")
    monkeypatch.setattr("madpo_ray.__version__", "999")
    other = Inputs("pairs", settings={"seed": 1})
    expected = [Difference("package", "madpo_ray", "0.2.0", "999")]
    assert differences(tmp_path / "pairs", other) == expected


def test_artifact_of_another_version_is_refused(tmp_path: Path) -> None:
    """Its manifest may look different."""
    old = (
        '{"stage": "pairs", "fingerprint": "0", "results": {}, "files": {"a": "0"}, '
        '"inputs": {"package": {"madpo_ray": "0.1.0"}, "settings": {"seed": 0}}}'
    )
    (tmp_path / "manifest.json").write_text(old)
    with pytest.raises(UserError, match=r"package\.madpo_ray: 0\.1\.0 -> 0\.2\.0"):
        require(tmp_path, INPUTS)
    with pytest.raises(UserError, match=r"package\.madpo_ray: 0\.1\.0 -> 0\.2\.0"):
        refuse_changed_content(tmp_path, INPUTS)
    assert not is_finished(tmp_path, INPUTS)


def test_changed_content_is_refused_and_changed_settings_are_not(tmp_path: Path) -> None:
    build(tmp_path / "pairs")
    content = Inputs("pairs", INPUTS.settings, INPUTS.upstream, {"files": {}})
    with pytest.raises(UserError, match="by the same config"):
        refuse_changed_content(tmp_path / "pairs", content)
    settings = Inputs("pairs", {"seed": 1}, INPUTS.upstream, {"files": {}})
    refuse_changed_content(tmp_path / "pairs", settings)
    names = Inputs("pairs", INPUTS.settings, INPUTS.upstream, {"files": {}}, {"files": ["b"]})
    refuse_changed_content(tmp_path / "pairs", names)


def test_names_do_not_count(tmp_path: Path) -> None:
    """The same content under another path."""
    build(tmp_path / "pairs")
    moved = Inputs(
        "pairs", INPUTS.settings, INPUTS.upstream, INPUTS.content, names={"files": ["/b/a.jsonl"]}
    )
    assert is_finished(tmp_path / "pairs", moved)


def test_failed_rebuild_keeps_the_old_result(tmp_path: Path) -> None:
    folder = tmp_path / "pairs"
    build(folder, text="old")
    with pytest.raises(FileNotFoundError), building(folder, INPUTS) as (partial, _):
        (partial / "missing folder" / "file.txt").write_text("new")
    assert (folder / "file.txt").read_text() == "old"
    assert is_finished(folder, INPUTS)
    build(folder, text="new")
    assert (folder / "file.txt").read_text() == "new"


def test_build_starts_from_an_empty_folder(tmp_path: Path) -> None:
    """Whatever a killed build left."""
    partial = tmp_path / "pairs.partial"
    partial.mkdir()
    (partial / "stale.txt").write_text("stale")
    build(tmp_path / "pairs")
    assert list(require(tmp_path / "pairs", INPUTS)["files"]) == ["file.txt"]


@pytest.mark.parametrize("change", ["missing", "emptied", "without a size"])
def test_damaged_file_is_named(change: str, tmp_path: Path) -> None:
    folder = tmp_path / "pairs"
    build(folder)
    file = folder / "file.txt"
    match change:
        case "missing":
            file.unlink()
            expected = "file.txt is missing"
        case "emptied":
            file.write_text("")
            expected = "file.txt has 0 bytes instead of 1"
        case "without a size":
            manifest = folder / "manifest.json"
            manifest.write_text(manifest.read_text().replace('"size"', '"other"'))
            expected = "file.txt has no size in the manifest"
    assert damage(folder) == [expected]
    assert not is_finished(folder, INPUTS)
    with pytest.raises(UserError, match=expected):
        require(folder, INPUTS)


def test_changed_byte_is_found_by_its_hash(tmp_path: Path) -> None:
    build(tmp_path / "pairs")
    (tmp_path / "pairs" / "file.txt").write_text("y")
    assert damage(tmp_path / "pairs") == []
    expected = ["file.txt has different content"]
    assert damage(tmp_path / "pairs", compare_hashes=True) == expected


def test_read_only_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        check_writable(tmp_path / "file" / "run")
    check_writable(tmp_path / "fine" / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
