"""Which failures a training survives."""

import pytest

from madpo_ray.restarts import Restarts


def test_progress_resets_the_count(caplog: pytest.LogCaptureFixture) -> None:
    """Rare faults of a long run do not add up."""
    restarts = Restarts(limit=2)
    for step in (0, 0, 10, 10, 20, 20):
        assert restarts.allows("a node was lost", step, is_error_of_code=False)
    assert not restarts.allows("a node was lost", 20, is_error_of_code=False)
    assert "starting the workers again from step 10, after: a node was lost" in caplog.text
    assert "cluster.max_failures: 2 restarts brought no progress" in caplog.text


def test_same_error_at_the_same_step_ends_the_run(caplog: pytest.LogCaptureFixture) -> None:
    restarts = Restarts(limit=-1)
    assert restarts.allows("ValueError: shape", 5, is_error_of_code=True)
    assert restarts.allows("ValueError: other", 5, is_error_of_code=True)
    assert restarts.allows("ValueError: other", 6, is_error_of_code=True)
    assert not restarts.allows("ValueError: other", 6, is_error_of_code=True)
    assert "the same error came again after step 6" in caplog.text


def test_without_a_limit_lost_workers_never_end_a_run() -> None:
    restarts = Restarts(limit=-1)
    assert all(restarts.allows("lost", 0, is_error_of_code=False) for _ in range(100))


def test_limit_of_none_ends_at_the_first_failure() -> None:
    assert not Restarts(limit=0).allows("lost", 0, is_error_of_code=False)
