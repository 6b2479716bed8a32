"""SIGTERM inside a block."""

import os
import signal
import threading

from madpo_ray.signals import on_sigterm


def send_sigterm() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def test_reacts_once_and_restores_the_handler() -> None:
    """The second SIGTERM goes to the handler that was there before."""
    outer: list[str] = []
    before = signal.signal(signal.SIGTERM, lambda *_: outer.append("outer"))
    try:
        inner: list[str] = []
        with on_sigterm(lambda: inner.append("inner")) as received:
            assert not received.is_set()
            send_sigterm()
            assert received.is_set()
            send_sigterm()
        send_sigterm()
        assert inner == ["inner"]
        assert outer == ["outer", "outer"]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_restores_the_handler_after_an_undisturbed_block() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with on_sigterm(lambda: None):
        assert signal.getsignal(signal.SIGTERM) is not before
    assert signal.getsignal(signal.SIGTERM) is before


def test_runs_without_a_handler_in_another_thread() -> None:
    before = signal.getsignal(signal.SIGTERM)
    seen = []

    def run() -> None:
        with on_sigterm(lambda: None) as received:
            seen.append(received.is_set())

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [False]
    assert signal.getsignal(signal.SIGTERM) is before
