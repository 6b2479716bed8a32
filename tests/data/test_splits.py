"""Identity and split of pairs."""

import contextlib
import dataclasses
import datetime
import hashlib
from typing import Any

import pytest

from madpo_ray.config import DataConfig
from madpo_ray.data.formats import Pair
from madpo_ray.data.splits import (
    Found,
    Repeats,
    content_hash,
    default_group,
    find_repeats,
    require_order,
    split_of,
    swapped_hash,
)

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


def found(*contents: str) -> list[Found]:
    """Pairs whose content is a lower-case letter, or its swapped pair's upper-case one."""
    return [
        Found((i // 3, i % 3, 0), content, content.swapcase(), "train")
        for i, content in enumerate(contents)
    ]


def left_out(contents: str, **changes: Any) -> list[int]:
    """Which pairs are left out."""
    pairs = found(*contents)
    repeats = find_repeats(lambda: pairs, DataConfig(files=("x",), **changes))
    return [i for i, pair in enumerate(pairs) if pair.place in repeats.left_out]


def test_repeats_are_numbered_across_files() -> None:
    repeats = find_repeats(lambda: found(*"abaab"), DataConfig(files=("x",)))
    assert repeats.occurrences == {(0, 2, 0): 1, (1, 0, 0): 2, (1, 1, 0): 1}
    assert repeats.num_duplicates == 3
    assert repeats.num_contradictions == 0
    assert not repeats.left_out


def test_swapped_pair_has_the_others_hash() -> None:
    swapped = dataclasses.replace(PAIR, chosen=PAIR.rejected, rejected=PAIR.chosen)
    assert swapped_hash(PAIR) == content_hash(swapped)
    assert swapped_hash(swapped) == content_hash(PAIR)


def test_duplicates_may_be_dropped() -> None:
    """The first one stays, also one that somebody contradicts."""
    assert left_out("abaAb", duplicates="drop") == [2, 4]


@pytest.mark.parametrize(
    ("contents", "by_drop", "by_majority"),
    [("ab", [], []), ("aAb", [0, 1], [0, 1]), ("aAab", [0, 1, 2], [1]), ("AabA", [0, 1, 3], [1])],
)
def test_contradictions_are_dropped_or_settled(
    contents: str, by_drop: list[int], by_majority: list[int]
) -> None:
    """By majority; as many of one as of the other settle nothing."""
    repeats = find_repeats(lambda: found(*contents), DataConfig(files=("x",)))
    assert repeats.num_contradictions == len(by_drop)
    assert not repeats.left_out
    assert left_out(contents, contradictions="drop") == by_drop
    assert left_out(contents, contradictions="majority") == by_majority


def test_majority_counts_duplicates_that_are_dropped() -> None:
    assert left_out("aAa", contradictions="majority", duplicates="drop") == [1, 2]


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


@pytest.mark.parametrize(
    ("places", "pair_ids", "message"),
    [
        ([(0, 0, 0), (0, 2, 0), (1, 0, 0)], ["a-0", "c-0"], ""),
        (
            [(0, 0, 0), (1, 2, 0), (0, 1, 0)],
            ["a-0", "c-0"],
            r"\(0, 1, 0\) .* came after \(1, 2, 0\)",
        ),
        ([(0, 0, 0), (0, 2, 0), (1, 0, 0)], ["c-0", "a-0"], "written in another order"),
        ([(0, 0, 0), (0, 2, 0), (1, 0, 0)], ["a-0"], "written in another order"),
    ],
)
def test_order_is_that_of_the_files(
    places: list[tuple[int, int, int]], pair_ids: list[str], message: str
) -> None:
    """The second pair is left out."""
    found = [
        Found(place, content, "", "train") for place, content in zip(places, "abc", strict=True)
    ]
    repeats = Repeats({}, {places[1]}, 0, 0)
    expected = pytest.raises(RuntimeError, match=message) if message else contextlib.nullcontext()
    with expected:
        require_order(found, pair_ids, repeats)
