"""A disk that is full, read-only or broken ends a command with one message."""

import errno
from pathlib import Path

import pytest
from ray.exceptions import RayTaskError, UserCodeException

from madpo_ray.disk import find_disk_error, find_write_error, in_units, stopping_on_disk_errors
from madpo_ray.errors import ExitCode, Stopped, UserError


def test_full_disk_ends_with_one_message(tmp_path: Path) -> None:
    """However deep the error is in the chain of causes."""
    failed = RuntimeError("a task failed")
    failed.__cause__ = OSError(errno.ENOSPC, "No space left on device", "/data/a")
    with pytest.raises(Stopped) as caught, stopping_on_disk_errors(tmp_path):
        raise failed
    assert caught.value.exit_code is ExitCode.FAILED
    assert caught.value.message.startswith("/data/a cannot be read or written: No space left on")
    assert f"are free in {tmp_path}. The same command resumes" in caught.value.message


def test_other_errors_pass(tmp_path: Path) -> None:
    for error in (FileNotFoundError(errno.ENOENT, "no"), ValueError(), UserError("wrong")):
        assert find_disk_error(error) is None
        with pytest.raises(type(error)), stopping_on_disk_errors(tmp_path):
            raise error


def test_full_disk_is_found_in_the_text_of_rusts_errors(tmp_path: Path) -> None:
    """As safetensors and tokenizers raise it, also through a Ray task."""
    error = RuntimeError("a task failed")
    error.__cause__ = Exception("Error while serializing: No space left on device (os error 28)")
    found = find_disk_error(error)
    assert found is not None
    assert found.errno == errno.ENOSPC
    assert find_disk_error(Exception("No such file or directory (os error 2)")) is None


def test_full_disk_is_found_in_the_text_of_rays_errors() -> None:
    """Of what a function of Ray Data raises, the driver gets the traceback only."""
    cause = UserCodeException("UDF failed to process a data block.")
    text = "  File chunks.py\nOSError: [Errno 28] No space left on device: '/data/a'"
    sent = RayTaskError("_score", text, cause, pid=1, ip="127.0.0.1").to_bytes()
    error = RayTaskError.from_bytes(sent)
    assert isinstance(error, RayTaskError)
    found = find_disk_error(error.as_instanceof_cause())
    assert found is not None
    assert found.errno == errno.ENOSPC


def test_torchs_write_error_is_one() -> None:
    """Where something was being written: a torn file that is read raises the same."""
    error = RuntimeError("[enforce fail at inline_container.cc:672] unexpected pos 64 vs 0")
    assert find_disk_error(error) is None
    found = find_write_error(error)
    assert found is not None
    assert found.errno == errno.EIO
    assert find_write_error(RuntimeError("shapes differ")) is None


def test_sizes_are_readable() -> None:
    assert in_units(200 * 2**10) == "0.2 MiB"
    assert in_units(3 * 2**30) == "3.0 GiB"
