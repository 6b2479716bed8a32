"""One command at a time writes a run, with and without locks of the file system."""

import errno
import fcntl
import json
import os
import signal
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from madpo_ray.artifacts import lock
from madpo_ray.artifacts.lock import LEASE, Holder, locked, read_lease
from madpo_ray.errors import UserError
from support.locks import hold_elsewhere


def write_lease(folder: Path, holder: Holder) -> None:
    (folder / LEASE).write_text(json.dumps(asdict(holder)))


def test_second_command_is_refused(tmp_path: Path) -> None:
    """It names stage, process and host of the first; after kill -9 of that it may start at once."""
    process = hold_elsewhere(tmp_path)
    expected = f"reward by process {process.pid} on {os.uname().nodename}"
    with pytest.raises(UserError, match=expected), locked(tmp_path, "pairs"):
        pass
    process.send_signal(signal.SIGKILL)
    process.wait()
    began = time.monotonic()
    with locked(tmp_path, "pairs"):
        pass
    assert time.monotonic() - began < 5
    assert read_lease(tmp_path) is None


def test_inner_block_uses_the_same_lock(tmp_path: Path) -> None:
    with locked(tmp_path, "run") as outer:
        with locked(tmp_path, "pairs") as inner:
            assert inner is outer
            found = read_lease(tmp_path)
            assert found is not None
            assert found.stage == "pairs"
        outer.require_held()
        found = read_lease(tmp_path)
        assert found is not None
        assert found.stage == "run"


@pytest.fixture
def without_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system as Lustre without `-o flock`."""

    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    monkeypatch.setattr(lock, "RENEW_S", 0.05)


@pytest.mark.usefixtures("without_locks")
def test_lease_guards_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first renews it, so that a second, of another machine, is refused."""
    said: list[str] = []
    with locked(tmp_path, "reward"), monkeypatch.context() as patch:
        patch.setattr(lock, "_held", {})  # as another process
        with (
            pytest.raises(UserError, match="reward by process"),
            locked(tmp_path, "pairs", say=said.append, lease_s=5),
        ):
            pass
    assert "waiting 5 s to see whether another command still runs" in said[0]


@pytest.mark.usefixtures("without_locks")
def test_abandoned_lease_is_taken_over(tmp_path: Path) -> None:
    write_lease(tmp_path, Holder("other", 7, "boot", "token", "reward"))
    with locked(tmp_path, "pairs", lease_s=0.2) as held:
        held.require_held()


@pytest.mark.usefixtures("without_locks")
def test_simultaneous_start_keeps_the_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without locks, and when neither found a lease."""
    other = Holder("other", 7, "boot", "token", "pairs")
    monkeypatch.setattr(time, "sleep", lambda seconds: write_lease(tmp_path, other))
    with (
        pytest.raises(UserError, match="pairs by process 7 on other"),
        locked(tmp_path, "reward"),
    ):
        pass
    assert read_lease(tmp_path) == other


def test_lease_of_another_machine_is_watched(tmp_path: Path) -> None:
    """Locks may hold per machine only; a lease of this machine needs no wait."""
    said: list[str] = []
    abandoned = Holder.of_this_process("reward")
    write_lease(tmp_path, abandoned)
    with locked(tmp_path, "pairs", say=said.append):
        assert said == []
    write_lease(tmp_path, replace(abandoned, host="other", boot="other"))
    with locked(tmp_path, "pairs", say=said.append, lease_s=0.2):
        assert len(said) == 1


@pytest.mark.usefixtures("without_locks")
def test_command_that_was_taken_over_keeps_nothing(tmp_path: Path) -> None:
    """As one that was suspended for longer than its lease."""
    with locked(tmp_path, "reward") as held:
        other = Holder("other", 7, "boot", "token", "pairs")
        # It does not renew what is not its own; a renewal that has begun may still be written.
        for _ in range(10):
            write_lease(tmp_path, other)
            time.sleep(0.3)
            if read_lease(tmp_path) == other:
                break
        with pytest.raises(UserError, match="pairs by process 7 on other"):
            held.require_held()
    assert read_lease(tmp_path) == other


@pytest.mark.parametrize("text", ["", "null", "{}", '{"host": 1}'])
def test_damaged_lease_counts_as_none(text: str, tmp_path: Path) -> None:
    (tmp_path / LEASE).write_text(text)
    with locked(tmp_path, "pairs"):
        pass
