"""Identity and split of pairs."""

import dataclasses

import pytest

from madpo_ray.config import DataConfig
from madpo_ray.data.formats import Pair
from madpo_ray.data.splits import content_hash, count_repeats, default_group, split_of

PAIR = Pair("p", "a", "b")


def test_split_follows_group_and_seed() -> None:
    data = DataConfig(files=("x",), validation_fraction=0.2, test_fraction=0.1)
    splits = [split_of(f"group {i}", data, 0) for i in range(3000)]
    assert splits == [split_of(f"group {i}", data, 0) for i in range(3000)]
    assert splits != [split_of(f"group {i}", data, 1) for i in range(3000)]
    assert splits.count("validation") / 3000 == pytest.approx(0.2, abs=0.03)
    assert splits.count("test") / 3000 == pytest.approx(0.1, abs=0.03)


@pytest.mark.parametrize("name", ["prompt", "chosen", "rejected"])
def test_hash_depends_on_every_text(name: str) -> None:
    other = dataclasses.replace(PAIR, **{name: "other"})
    assert content_hash(other) != content_hash(PAIR) == content_hash(Pair("p", "a", "b"))


def test_group_is_the_prompt() -> None:
    assert default_group(PAIR) == default_group(Pair("p", "c", "b"))
    assert default_group(PAIR) != default_group(Pair("q", "a", "b"))


def test_hash_depends_on_tools() -> None:
    """Another set of tools is another prompt."""
    with_tools = dataclasses.replace(PAIR, tools=[{"name": "f"}])
    assert content_hash(with_tools) != content_hash(PAIR)


def test_repeats_are_numbered_across_files() -> None:
    hashes = [("a", (0, 0)), ("b", (0, 1)), ("a", (0, 2)), ("a", (1, 0))]
    assert count_repeats(hashes) == {(0, 2): 1, (1, 0): 2}
