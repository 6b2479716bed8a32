"""Artifacts: finished or not, made from what, and never half overwritten."""

import os
from pathlib import Path

import pytest

from madpo_ray.artifacts.manifest import (
    Difference,
    Inputs,
    building,
    check_writable,
    differences,
    hash_file,
    hash_files,
    is_finished,
    read_manifest,
    refuse_changed_content,
    require,
)
from madpo_ray.atomic import write_text
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
    with pytest.raises(UserError, match="run `madpo-ray pairs` first"):
        require(folder, INPUTS)
    build(folder)
    assert is_finished(folder, INPUTS)
    assert require(folder, INPUTS)["results"] == {"count": 1}
    assert require(folder, INPUTS)["files"] == {"file.txt": hash_file(folder / "file.txt")}


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


def test_artifact_of_the_first_version_is_refused(tmp_path: Path) -> None:
    """Its manifest kept the version among the content and had no upstream."""
    old = (
        '{"stage": "pairs", "fingerprint": "0", "results": {}, "files": {}, '
        '"inputs": {"settings": {"seed": 0}, "content": {"madpo_ray": "0.1.0"}}}'
    )
    (tmp_path / "manifest.json").write_text(old)
    with pytest.raises(UserError, match=r"package\.madpo_ray: 0\.1\.0 -> 0\.2\.0"):
        require(tmp_path, INPUTS)
    with pytest.raises(UserError, match=r"package\.madpo_ray: 0\.1\.0 -> 0\.2\.0"):
        refuse_changed_content(tmp_path, INPUTS)


def test_changed_content_is_refused_and_changed_settings_are_not(tmp_path: Path) -> None:
    build(tmp_path / "pairs")
    content = Inputs("pairs", INPUTS.settings, INPUTS.upstream, {"files": {}})
    with pytest.raises(UserError, match="by the same config"):
        refuse_changed_content(tmp_path / "pairs", content)
    settings = Inputs("pairs", {"seed": 1}, INPUTS.upstream, {"files": {}})
    refuse_changed_content(tmp_path / "pairs", settings)


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


def test_second_build_is_refused(tmp_path: Path) -> None:
    with building(tmp_path / "pairs", INPUTS) as (partial, _):
        (partial / "file.txt").write_text("x")
        message = "another process is making"
        with pytest.raises(UserError, match=message), building(tmp_path / "pairs", INPUTS):
            pass
    assert is_finished(tmp_path / "pairs", INPUTS)


def test_lost_file_is_named(tmp_path: Path) -> None:
    build(tmp_path / "pairs")
    (tmp_path / "pairs" / "file.txt").unlink()
    with pytest.raises(UserError, match=r"lost file\.txt"):
        require(tmp_path / "pairs", INPUTS)


def test_read_only_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        check_writable(tmp_path / "file" / "run")
    check_writable(tmp_path / "fine")
    assert list((tmp_path / "fine").iterdir()) == []
    assert read_manifest(tmp_path / "fine") is None


def test_hash_follows_an_edit_of_equal_size(tmp_path: Path) -> None:
    """The cache looks at the time of change, too."""
    file = tmp_path / "a.txt"
    file.write_text("one")
    before = hash_file(file)
    time = file.stat().st_mtime_ns
    write_text(file, "two")
    os.utime(file, ns=(time + 1, time + 1))
    assert hash_file(file) != before
    assert hash_files(tmp_path) == {"a.txt": hash_file(file)}
