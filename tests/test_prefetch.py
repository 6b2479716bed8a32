"""Items that a thread makes while the ones before are in use."""

import threading
from collections.abc import Iterator

import pytest

from madpo_ray.prefetch import prefetched


def test_items_keep_their_order() -> None:
    assert list(prefetched(iter(range(5)))) == [0, 1, 2, 3, 4]
    assert list(prefetched(iter([]))) == []
    assert list(prefetched(iter([None, False]))) == [None, False]


def test_the_next_item_is_made_while_one_is_in_use() -> None:
    made = [threading.Event() for _ in range(4)]

    def numbers() -> Iterator[int]:
        for number, event in enumerate(made):
            event.set()
            yield number

    taken = prefetched(numbers())
    assert next(taken) == 0
    assert made[1].wait(timeout=10)
    assert not made[2].is_set()
    taken.close()  # type: ignore[attr-defined]
    assert not made[2].is_set()


def test_an_error_comes_at_its_place() -> None:
    def numbers() -> Iterator[int]:
        yield 1
        raise ValueError("no second")

    taken = prefetched(numbers())
    assert next(taken) == 1
    with pytest.raises(ValueError, match="no second"):
        next(taken)
