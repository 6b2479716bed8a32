"""What a scoring pass reports while it runs."""

import logging

import pytest

from madpo_ray.scoring.progress import ScoringProgress


def test_reports_rates_and_the_time_left(caplog: pytest.LogCaptureFixture) -> None:
    """Every half minute, since the first scores, and at the end."""
    caplog.set_level(logging.INFO)
    times = iter([0.0, 20.0, 25.0, 40.0, 60.0, 120.0])
    progress = ScoringProgress(1000, clock=lambda: next(times))
    for pairs in (100, 50, 150, 200, 500):
        progress.add(pairs, 10 * pairs)
    assert [record.getMessage() for record in caplog.records] == [
        "scored 300 of 1000 pairs: 10.0 pairs/s, 100 tokens/s, 70 s left",
        "scored 1000 of 1000 pairs: 9.0 pairs/s, 90 tokens/s",
    ]


@pytest.mark.parametrize(
    ("left", "expected"), [(500, "50 s"), (5000, "8 min"), (500_000, "13.9 h")]
)
def test_time_left(left: int, expected: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    times = iter([0.0, 0.0, 100.0])
    progress = ScoringProgress(1000 + left, clock=lambda: next(times))
    progress.add(0, 0)
    progress.add(1000, 1000)
    assert caplog.text.rstrip().endswith(f"{expected} left")


def test_one_batch_has_no_rate(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    ScoringProgress(5, clock=lambda: 1.0).add(5, 50)
    assert caplog.records[0].getMessage() == "scored 5 of 5 pairs"
