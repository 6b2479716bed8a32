"""Prints what a command is waiting for, after a minute without progress."""

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

logger = logging.getLogger(__name__)

FIRST_NOTICE_S = 60.0
POLLS_PER_NOTICE = 12


@contextlib.contextmanager
def waiting(
    what: str, *, progress: Callable[[], Any] = lambda: None, first_notice_s: float = FIRST_NOTICE_S
) -> Iterator[None]:
    """Logs `what` after a minute in the block without progress, then after 2, 4, 8, ... minutes.

    Args:
        progress: any value that changes if something happens, such as the size of a file.
    """
    is_done = threading.Event()
    watcher = threading.Thread(
        target=_watch, args=(what, progress, first_notice_s, is_done), daemon=True, name="waiting"
    )
    watcher.start()
    try:
        yield
    finally:
        is_done.set()
        watcher.join(timeout=1.0)  # it may hang in a read of a file system that does not answer


def _watch(
    what: str, progress: Callable[[], Any], first_notice_s: float, is_done: threading.Event
) -> None:
    seen: Any = object()
    since = time.monotonic()
    notice_s = first_notice_s
    while not is_done.wait(first_notice_s / POLLS_PER_NOTICE):
        try:
            now = progress()
        except OSError:  # a file that moves, or a file system that fails for a moment
            continue
        if now != seen:
            seen = now
            since = time.monotonic()
            notice_s = first_notice_s
        waited_s = time.monotonic() - since
        if waited_s >= notice_s:
            logger.info("no progress for %.0f s: %s", waited_s, what)
            notice_s *= 2
