"""Identity and split of pairs."""

import dataclasses
import datetime
import hashlib
from typing import Any

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
    assert set(splits) == {"train", "validation", "test"}
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


def test_hash_of_a_text_pair_by_hand() -> None:
    """So that the ids of finished artifacts stay what they are."""
    digest = hashlib.sha256(b'["p", "a", "b"]').hexdigest()
    assert content_hash(PAIR) == digest[:16]


@pytest.mark.parametrize("changes", [{"tools": [{"x": 1}]}, {"template_options": {"x": 1}}])
def test_what_the_template_gets_is_part_of_the_identity(changes: dict[str, Any]) -> None:
    assert content_hash(dataclasses.replace(PAIR, **changes)) != content_hash(PAIR)


def test_order_of_keys_is_not() -> None:
    """Nor of the group."""
    one = Pair([{"role": "user", "content": "p"}], "a", "b")
    other = Pair([{"content": "p", "role": "user"}], "a", "b")
    assert content_hash(one) == content_hash(other)
    assert default_group(one) == default_group(other)


def test_values_that_json_lacks_have_an_identity() -> None:
    """Parquet has dates."""
    pair = Pair([{"role": "user", "content": "p", "day": datetime.date(2020, 1, 1)}], "a", "b")
    assert len(content_hash(pair)) == 16
    assert "2020-01-01" in default_group(pair)
