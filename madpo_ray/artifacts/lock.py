"""One command at a time writes a run: a lock on its folder, and a lease next to it.

The lock (`flock`) is released when its process ends, however it ends. Some shared file systems have
no locks, or lock per node only, so the holder also renews a lease, a small file. A command that
finds another machine's lease watches it first: while it is being renewed, the other command is
running.
"""

import contextlib
import errno
import fcntl
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TextIO

from madpo_ray.atomic import write_json
from madpo_ray.errors import UserError

logger = logging.getLogger(__name__)

LOCK = ".lock"
LEASE = ".lease.json"
# Network file systems show another machine's file up to a minute late.
LEASE_S = 90.0
RENEW_S = 5.0
SETTLE_S = 1.0  # without locks: of two commands that start at once, the later one keeps the run
# What flock raises on file systems without locks.
NO_LOCKS = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL}


@dataclass(frozen=True)
class Holder:
    """The command that writes a run."""

    host: str
    pid: int
    boot: str  # of the machine's kernel: two containers of one machine have the same
    token: str  # of this command only
    stage: str
    renewals: int = 0

    @classmethod
    def of_this_process(cls, stage: str) -> "Holder":
        return cls(socket.gethostname(), os.getpid(), _boot_id(), uuid.uuid4().hex, stage)

    def __str__(self) -> str:
        return f"{self.stage} by process {self.pid} on {self.host}"


class RunLock:
    """The lock of a run that this process holds, and its lease."""

    def __init__(self, folder: Path, holder: Holder) -> None:
        self._folder = folder
        self._holder = holder
        self._writing = threading.Lock()
        self._stopped = threading.Event()
        self._renewer = threading.Thread(target=self._renew, daemon=True, name="lease")

    def start(self) -> None:
        try:
            write_json(self._folder / LEASE, asdict(self._holder))
        except FileNotFoundError:  # without locks: another command writes its lease right now
            raise _refusal(self._folder, read_lease(self._folder)) from None
        self._renewer.start()

    def stop(self) -> None:
        self._stopped.set()
        self._renewer.join(timeout=RENEW_S)  # it may hang in a file system that does not answer
        if self._other_holder() is None:
            (self._folder / LEASE).unlink(missing_ok=True)

    @contextlib.contextmanager
    def at(self, stage: str) -> Iterator[None]:
        """The lease names this stage during the block."""
        before = self._holder.stage
        self._set_stage(stage)
        try:
            yield
        finally:
            self._set_stage(before)

    def require_held(self) -> None:
        """Raises UserError if another command took the run over, as after a long pause."""
        if (other := self._other_holder()) is not None:
            raise UserError(
                f"{self._folder} was taken over by another command ({other}), so the results of "
                "this one are not kept"
            )

    def _other_holder(self) -> Holder | None:
        """Another command whose lease is there. One that cannot be read does not count."""
        found = read_lease(self._folder)
        return None if found is None or found.token == self._holder.token else found

    def _set_stage(self, stage: str) -> None:
        with contextlib.suppress(OSError):  # a full disk: the stage itself will report it
            self._write(stage=stage)

    def _write(self, **changes: Any) -> None:
        with self._writing:
            self._holder = replace(self._holder, **changes)
            if self._other_holder() is None:
                write_json(self._folder / LEASE, asdict(self._holder))

    def _renew(self) -> None:
        while not self._stopped.wait(RENEW_S):
            try:
                self._write(renewals=self._holder.renewals + 1)
            except OSError as error:
                logger.warning("the lease of %s was not renewed: %s", self._folder, error)


_held: dict[Path, RunLock] = {}  # by this process


@contextlib.contextmanager
def locked(
    folder: Path, stage: str, *, say: Callable[[str], None] = logger.info, lease_s: float = LEASE_S
) -> Iterator[RunLock]:
    """Holds the lock of a run's folder. A block inside such a block uses the same lock.

    Args:
        stage: what the command makes, for the message that another one prints.
        lease_s: how long the lease of another machine is watched.

    Raises:
        UserError: another command writes the run; names its host, process and stage.
    """
    folder = folder.resolve()
    if folder in _held:
        with _held[folder].at(stage):
            yield _held[folder]
        return

    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("a") as file:
        has_locks = _flock(file, folder)
        _watch_lease(folder, has_locks, say, lease_s)
        lock = RunLock(folder, Holder.of_this_process(stage))
        lock.start()
        _held[folder] = lock
        try:
            if not has_locks:
                time.sleep(SETTLE_S)
                lock.require_held()
            yield lock
        finally:
            del _held[folder]
            lock.stop()


def read_lease(folder: Path) -> Holder | None:
    """Who wrote the lease of a run's folder; None if there is none, or none that can be read."""
    try:
        return Holder(**json.loads((folder / LEASE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _flock(file: TextIO, folder: Path) -> bool:
    """Takes the lock; False if the file system has none."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise _refusal(folder, read_lease(folder)) from None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise UserError(f"{folder} cannot be locked: {error.strerror}") from None
        return False
    # Somebody may have deleted the file, and another command made it again.
    path = folder / LOCK
    if not path.exists() or not os.path.samestat(os.fstat(file.fileno()), path.stat()):
        raise UserError(f"{path} was deleted meanwhile: run the command again")
    return True


def _watch_lease(folder: Path, has_locks: bool, say: Callable[[str], None], lease_s: float) -> None:
    """Raises UserError if the lease is renewed while it is watched."""
    found = read_lease(folder)
    if found is None:
        return
    # The lock of a process on this machine ended with it.
    if has_locks and found.boot == _boot_id():
        return

    say(f"{folder}: waiting {lease_s:.0f} s to see whether another command still runs ({found})")
    until = time.monotonic() + lease_s
    while time.monotonic() < until:
        time.sleep(min(1.0, lease_s / 10))
        now = read_lease(folder)
        if now is None:  # it has ended
            return
        if now != found:
            raise _refusal(folder, now)


def _refusal(folder: Path, holder: Holder | None) -> UserError:
    who = f"another command writes it: {holder}" if holder else "another command writes it"
    return UserError(f"{folder} is in use, {who}. Wait for it, or set another run.name")


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:  # not Linux
        return socket.gethostname()
