"""Spelling suggestions, and errors of a disk."""

import errno
from pathlib import Path

import pytest

from madpo_ray.errors import (
    ExitCode,
    Stopped,
    UserError,
    did_you_mean,
    ending_on_write_errors,
    find_write_error,
)


def test_names_the_closest_key() -> None:
    assert did_you_mean("bta", ["alpha", "beta"]) == "; did you mean 'beta'?"


def test_lists_all_keys_if_none_is_close() -> None:
    assert did_you_mean("xyz", {"beta", "alpha"}) == "; known are alpha, beta"


def test_full_disk_ends_with_one_message(tmp_path: Path) -> None:
    """However deep the error is in the chain of causes."""
    failed = RuntimeError("a task failed")
    failed.__cause__ = OSError(errno.ENOSPC, "No space left on device", "/data/a")
    with pytest.raises(Stopped) as caught, ending_on_write_errors(tmp_path):
        raise failed
    assert caught.value.exit_code is ExitCode.FAILED
    assert caught.value.message.startswith("/data/a cannot be read or written: No space left on")
    assert f"GiB are free in {tmp_path}. The same command resumes" in caught.value.message


def test_other_errors_pass(tmp_path: Path) -> None:
    for error in (FileNotFoundError(errno.ENOENT, "no"), ValueError(), UserError("wrong")):
        assert find_write_error(error) is None
        with pytest.raises(type(error)), ending_on_write_errors(tmp_path):
            raise error
