"""Work of the host that is done while a device computes."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def prefetched(items: Iterator[T]) -> Iterator[T]:
    """The items in order, each made by a thread while the one before is in use.

    What the iterator raises is raised at its place. At most one item is made that nobody takes.
    """
    end = object()
    executor = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
    try:
        upcoming = executor.submit(next, items, end)
        while (item := upcoming.result()) is not end:
            upcoming = executor.submit(next, items, end)
            yield item  # type: ignore[misc]  # anything but `end` is a T
    finally:
        # Whoever stops early does not wait for the item that is being made; the process's end does.
        executor.shutdown(wait=False, cancel_futures=True)
