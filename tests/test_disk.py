"""A disk that is full, read-only or broken ends a command with one message."""

import errno
from pathlib import Path

import pytest

from madpo_ray.disk import find_disk_error, stopping_on_disk_errors
from madpo_ray.errors import ExitCode, Stopped, UserError


def test_full_disk_ends_with_one_message(tmp_path: Path) -> None:
    """However deep the error is in the chain of causes."""
    failed = RuntimeError("a task failed")
    failed.__cause__ = OSError(errno.ENOSPC, "No space left on device", "/data/a")
    with pytest.raises(Stopped) as caught, stopping_on_disk_errors(tmp_path):
        raise failed
    assert caught.value.exit_code is ExitCode.FAILED
    assert caught.value.message.startswith("/data/a cannot be read or written: No space left on")
    assert f"GiB are free in {tmp_path}. The same command resumes" in caught.value.message


def test_other_errors_pass(tmp_path: Path) -> None:
    for error in (FileNotFoundError(errno.ENOENT, "no"), ValueError(), UserError("wrong")):
        assert find_disk_error(error) is None
        with pytest.raises(type(error)), stopping_on_disk_errors(tmp_path):
            raise error
