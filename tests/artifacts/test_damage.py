"""Files of a run that are damaged while no command runs."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from madpo_ray.artifacts.building import building
from madpo_ray.artifacts.lock import LEASE, Holder, locked
from madpo_ray.artifacts.manifest import Inputs, damage, is_finished
from support.faults import DAMAGES, FILE_DAMAGES, Record

INPUTS = Inputs("pairs")
# What only `madpo-ray verify` finds: sizes are compared at each start, hashes are not.
SAME_SIZE = {name: DAMAGES[name] for name in ("zeros", "one bit changed")}


def build(folder: Path) -> None:
    with building(folder, INPUTS) as (partial, _):
        (partial / "data").mkdir()
        (partial / "data" / "part.txt").write_text("some rows")


@pytest.mark.parametrize(
    ("file", "unnoticed"),
    [("manifest.json", {"one bit changed"}), ("data/part.txt", set(SAME_SIZE))],
)
def test_damaged_result_is_made_again(
    file: str, unnoticed: set[str], tmp_path: Path, record: Record
) -> None:
    damages = {name: change for name, change in DAMAGES.items() if name not in unnoticed}
    for number, change in enumerate(damages.values()):
        folder = tmp_path / str(number) / "pairs"
        build(folder)
        change(folder / file)
        assert not is_finished(folder, INPUTS)
        build(folder)
        assert is_finished(folder, INPUTS)
        assert (folder / "data" / "part.txt").read_text() == "some rows"
    kinds = f"{len(damages)} kinds of damage"
    record(f"finished result, {file}", kinds, len(damages), "found at the start, made again")


def test_damage_of_the_same_size_is_found_by_hash(tmp_path: Path, record: Record) -> None:
    for name, change in SAME_SIZE.items():
        folder = tmp_path / name
        build(folder)
        change(folder / "data" / "part.txt")
        assert len(damage(folder, compare_hashes=True)) == 1
    record(
        "finished result, data/part.txt",
        f"{len(SAME_SIZE)} of the same size",
        len(SAME_SIZE),
        "found by `verify`",
    )


def test_damaged_lease_is_ignored(tmp_path: Path, record: Record) -> None:
    holder = json.dumps(asdict(Holder("a", 1, "", "", "")))
    for change in FILE_DAMAGES.values():
        (tmp_path / LEASE).write_text(holder)
        change(tmp_path / LEASE)
        with locked(tmp_path, "pairs", lease_s=0.1):
            pass
    kinds = f"{len(FILE_DAMAGES)} kinds of damage"
    record(LEASE, kinds, len(FILE_DAMAGES), "the next command starts")
