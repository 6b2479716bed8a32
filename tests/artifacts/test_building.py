"""A result in its place: the old one or the new one, after any end of the process."""

import functools
import itertools
import os
from pathlib import Path

import pytest

from madpo_ray.artifacts.building import (
    building,
    check_trusted,
    discard,
    has_leftovers,
    recover,
)
from madpo_ray.artifacts.manifest import Inputs, is_finished, read_manifest
from madpo_ray.errors import UserError
from support.faults import KINDS, Record, run_with_fault

OLD = Inputs("pairs", settings={"seed": 0})
NEW = Inputs("pairs", settings={"seed": 1})


def build(folder: Path, inputs: Inputs) -> None:
    with building(folder, inputs) as (partial, _):
        (partial / "data").mkdir()
        for i in range(3):
            (partial / "data" / f"{i}.txt").write_text(f"{inputs.settings['seed']} {i}")


def content(folder: Path) -> list[str]:
    return [path.read_text() for path in sorted(folder.rglob("*.txt"))]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("has_old", [False, True])
def test_one_result_survives_every_fault(
    kind: str, has_old: bool, tmp_path: Path, record: Record
) -> None:
    """Whichever file operation fails: the old result or the new one is complete, and the build
    gives the new one when it is repeated.
    """
    for number in itertools.count(1):
        root = tmp_path / str(number)
        folder = root / "pairs"
        if has_old:
            build(folder, OLD)
        if not run_with_fault(functools.partial(build, folder, NEW), root, number, kind):
            break
        recover(folder, NEW)
        if has_old:
            assert is_finished(folder, OLD) or is_finished(folder, NEW)
        if not is_finished(folder, NEW):
            build(folder, NEW)
        assert is_finished(folder, NEW)
        assert content(folder) == ["1 0", "1 1", "1 2"]
        build(folder, OLD)  # what the fault left behind does not matter
        assert [path.name for path in root.iterdir()] == ["pairs"]
    assert number > 8
    place = "result in place of an old one" if has_old else "first result"
    record(place, f"{kind} at the n-th file operation", number - 1, "same result")


def test_finished_partial_is_adopted(tmp_path: Path) -> None:
    """A kill between the two moves costs nothing."""
    folder = tmp_path / "pairs"
    build(folder, NEW)
    time = (folder / "manifest.json").stat().st_mtime_ns
    folder.rename(tmp_path / "pairs.partial")
    recover(folder, OLD)
    assert read_manifest(folder) is None  # it is of other inputs
    recover(folder, NEW)
    assert (folder / "manifest.json").stat().st_mtime_ns == time


def test_old_result_is_put_back(tmp_path: Path) -> None:
    folder = tmp_path / "pairs"
    build(folder, OLD)
    folder.rename(tmp_path / "pairs.old")
    recover(folder, NEW)
    assert is_finished(folder, OLD)


def test_damaged_partial_is_not_adopted(tmp_path: Path) -> None:
    folder = tmp_path / "pairs"
    build(folder, NEW)
    (folder / "data" / "1.txt").unlink()
    folder.rename(tmp_path / "pairs.partial")
    recover(folder, NEW)
    assert read_manifest(folder) is None


def test_folder_may_be_a_link(tmp_path: Path) -> None:
    """To another disk: the result is built and moved there."""
    disk = tmp_path / "disk"
    disk.mkdir()
    folder = tmp_path / "run" / "pairs"
    folder.parent.mkdir()
    folder.symlink_to(disk / "pairs")
    build(folder, OLD)
    build(folder, NEW)
    assert folder.is_symlink()
    assert is_finished(folder, NEW)
    assert [path.name for path in disk.iterdir()] == ["pairs"]
    assert [path.name for path in folder.parent.iterdir()] == ["pairs"]


def test_undeletable_old_result_is_tolerated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As on NFS, which keeps files that are open somewhere."""
    folder = tmp_path / "pairs"
    build(folder, OLD)

    def refuse(path: Path) -> None:
        raise OSError(39, "Directory not empty", str(path))

    with monkeypatch.context() as patch:
        patch.setattr("madpo_ray.artifacts.building.shutil.rmtree", refuse)
        build(folder, NEW)
        build(folder, OLD)
    assert "cannot be deleted" in caplog.text
    assert is_finished(folder, OLD)
    build(folder, NEW)
    discard(tmp_path / "pairs.partial")
    assert [path.name for path in tmp_path.iterdir()] == ["pairs"]


def test_nothing_is_kept_if_it_is_not_confirmed(tmp_path: Path) -> None:
    folder = tmp_path / "pairs"
    build(folder, OLD)

    def refuse() -> None:
        raise UserError("changed")

    with (
        pytest.raises(UserError, match="changed"),
        building(folder, NEW, confirm=refuse) as (partial, _),
    ):
        (partial / "file.txt").write_text("x")
    assert is_finished(folder, OLD)
    recover(folder, NEW)
    assert is_finished(folder, OLD)


def test_folder_that_others_can_write_is_not_trusted(tmp_path: Path) -> None:
    run = tmp_path / "run"
    check_trusted(run)
    run.mkdir()
    check_trusted(run)
    run.chmod(0o777)
    with pytest.raises(UserError, match="chmod -R o-w"):
        check_trusted(run)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
def test_folder_of_another_user_is_not_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.chown(tmp_path, 1234, 1234)
    check_trusted(tmp_path)
    monkeypatch.setattr(os, "geteuid", lambda: 4321)
    with pytest.raises(UserError, match="belongs to another user"):
        check_trusted(tmp_path)


def test_discards_whatever_has_the_name(tmp_path: Path) -> None:
    """A file, or a link; what a link leads to stays."""
    archive = tmp_path / "archive"
    build(archive, OLD)
    folder = tmp_path / "run" / "pairs"
    folder.parent.mkdir()
    folder.with_name("pairs.partial").symlink_to(tmp_path / "nothing")
    folder.with_name("pairs.old").symlink_to(archive)
    folder.write_text("a file")
    build(folder, NEW)
    assert [path.name for path in folder.parent.iterdir()] == ["pairs"]
    assert is_finished(archive, OLD)


@pytest.mark.parametrize("name", ["pairs.partial", "pairs.old", ".pairs.old.trash-0"])
def test_leftovers_are_found_and_deleted(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "pairs"
    build(folder, NEW)
    assert not has_leftovers(folder)
    build(tmp_path / "other", OLD)
    (tmp_path / "other").rename(tmp_path / name)
    assert has_leftovers(folder)
    recover(folder, NEW)
    discard(tmp_path / "nothing")
    assert not has_leftovers(folder)
    assert is_finished(folder, NEW)


@pytest.mark.parametrize("below", ["train", "ray/train-1", "ray/train-1/checkpoint_00000001"])
def test_folders_of_a_run_are_not_trusted_either(below: str, tmp_path: Path) -> None:
    (tmp_path / below).mkdir(parents=True)
    check_trusted(tmp_path)
    (tmp_path / below).chmod(0o777)
    with pytest.raises(UserError, match=f"{below}, and checkpoints .* `chmod -R o-w {tmp_path}`"):
        check_trusted(tmp_path)
