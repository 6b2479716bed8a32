"""Which failures a training survives."""

import pytest

from madpo_ray.restarts import Restarts


def test_progress_resets_the_count(caplog: pytest.LogCaptureFixture) -> None:
    """Rare faults of a long run do not add up."""
    restarts = Restarts(limit=2)
    for step in (0, 0, 10, 10, 20, 20):
        assert restarts.record_failure("a node was lost", step, is_deterministic=False)
    assert not restarts.record_failure("a node was lost", 20, is_deterministic=False)
    assert "starting the workers again from step 10, after: a node was lost" in caplog.text
    assert "no progress after 2 restarts (cluster.max_failures)" in caplog.text


def test_same_error_at_the_same_step_ends_the_run(caplog: pytest.LogCaptureFixture) -> None:
    restarts = Restarts(limit=-1)
    assert restarts.record_failure("ValueError: shape", 5, is_deterministic=True)
    assert restarts.record_failure("ValueError: other", 5, is_deterministic=True)
    assert restarts.record_failure("ValueError: other", 6, is_deterministic=True)
    assert not restarts.record_failure("ValueError: other", 6, is_deterministic=True)
    assert "the same error occurred twice at step 6" in caplog.text


def test_without_a_limit_lost_workers_never_end_a_run() -> None:
    restarts = Restarts(limit=-1)
    assert all(restarts.record_failure("lost", 0, is_deterministic=False) for _ in range(100))


def test_limit_of_none_ends_at_the_first_failure() -> None:
    assert not Restarts(limit=0).record_failure("lost", 0, is_deterministic=False)
