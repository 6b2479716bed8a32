"""What a command waits for, if nothing happens."""

import logging
import time

import pytest

from madpo_ray.waiting import waiting


def test_reports_a_wait(caplog: pytest.LogCaptureFixture) -> None:
    """Less often each time."""
    caplog.set_level(logging.INFO)
    with waiting("a place for the workers", first_notice_s=0.1):
        time.sleep(0.9)
    assert "a place for the workers" in caplog.text
    assert 2 <= len(caplog.records) <= 4


def test_progress_resets_the_wait(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with waiting("steps", progress=time.monotonic, first_notice_s=0.1):
        time.sleep(0.5)
    assert caplog.text == ""
