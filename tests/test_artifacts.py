"""Artifacts: finished or not, made from what, and never half written over."""

from pathlib import Path

import pytest

from madpo_ray.artifacts import Inputs, building, check_writable, differences, is_finished, read_manifest, require
from madpo_ray.config import UserError

INPUTS = Inputs("pairs", {"seed": 0, "data": {"max_length": 64}}, {"files": {"a.jsonl": "0" * 64}})


def build(folder: Path, inputs: Inputs = INPUTS, text: str = "x") -> None:
    with building(folder, inputs) as (partial, results):
        (partial / "file.txt").write_text(text)
        results["count"] = 1


def test_a_stage_is_finished_when_its_manifest_exists(tmp_path: Path) -> None:
    folder = tmp_path / "pairs"
    with pytest.raises(UserError, match="run `madpo-ray pairs` first"):
        require(folder, INPUTS)
    build(folder)
    assert is_finished(folder, INPUTS)
    assert require(folder, INPUTS)["results"] == {"count": 1}
    assert list(require(folder, INPUTS)["files"]) == ["file.txt"]


def test_other_inputs_are_refused_by_name(tmp_path: Path) -> None:
    build(tmp_path / "pairs")
    changed = Inputs("pairs", {"seed": 0, "data": {"max_length": 128}}, {"files": {"a.jsonl": "1" * 64}})
    assert differences(tmp_path / "pairs", changed) == [
        "content.files.a.jsonl: 000000000000… -> 111111111111…",
        "settings.data.max_length: 64 -> 128",
    ]
    with pytest.raises(UserError, match=r"settings\.data\.max_length: 64 -> 128"):
        require(tmp_path / "pairs", changed)


def test_another_version_of_the_package_differs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(tmp_path / "pairs")
    monkeypatch.setattr("madpo_ray.__version__", "999")
    assert differences(tmp_path / "pairs", INPUTS) == ["content.madpo_ray: 0.1.0 -> 999"]


def test_a_failed_rebuild_leaves_the_old_result(tmp_path: Path) -> None:
    folder = tmp_path / "pairs"
    build(folder, text="old")
    with pytest.raises(FileNotFoundError), building(folder, INPUTS) as (partial, _):
        (partial / "missing folder" / "file.txt").write_text("new")
    assert (folder / "file.txt").read_text() == "old"
    assert is_finished(folder, INPUTS)
    build(folder, text="new")
    assert (folder / "file.txt").read_text() == "new"


def test_two_do_not_build_the_same(tmp_path: Path) -> None:
    with building(tmp_path / "pairs", INPUTS) as (partial, _):
        (partial / "file.txt").write_text("x")
        with pytest.raises(UserError, match="another process is making"), building(tmp_path / "pairs", INPUTS):
            pass
    assert is_finished(tmp_path / "pairs", INPUTS)


def test_a_lost_file_is_told(tmp_path: Path) -> None:
    build(tmp_path / "pairs")
    (tmp_path / "pairs" / "file.txt").unlink()
    with pytest.raises(UserError, match=r"lacks file\.txt"):
        require(tmp_path / "pairs", INPUTS)


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        check_writable(tmp_path / "file" / "run")
    check_writable(tmp_path / "fine")
    assert read_manifest(tmp_path / "fine") is None
