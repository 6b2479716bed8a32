"""SIGTERM, handled for the length of a block."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def on_sigterm(
    react: Callable[[], None], *, prepare: Callable[[], None] = lambda: None
) -> Iterator[threading.Event]:
    """Calls `react` on the first SIGTERM inside the block and sets the event that it yields.

    The handler that was there before is restored by the first SIGTERM and at the end of the block,
    so a second SIGTERM does what it did before. Signals belong to the main thread: in any other
    thread (a trial of Tune) the block runs without a handler.

    Args:
        prepare: called first; a handler that it installs is replaced, too.
    """
    received = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        prepare()
        yield received
        return

    # For the length of the block, or until the first signal.
    before = signal.getsignal(signal.SIGTERM)

    def handle(*_: Any) -> None:
        signal.signal(signal.SIGTERM, before)
        received.set()
        react()

    try:
        prepare()
        signal.signal(signal.SIGTERM, handle)
        yield received
    finally:
        signal.signal(signal.SIGTERM, before)
