"""Faults at the n-th file operation of a process, and damage to files that are there."""

import errno
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
# Python's audit events of what changes files, and which arguments are paths.
EVENTS = {
    "open": 1,
    "os.mkdir": 1,
    "os.remove": 1,
    "os.rename": 2,
    "os.rmdir": 1,
    "os.truncate": 1,
    "os.symlink": 2,
}
SURVIVED = 3  # exit code of a process that ended although an operation had failed
# Adds a row to the table of faults: where, which fault, how many, and how each ended.
Record = Callable[[str, str, int, str], None]
ROWS: list[tuple[str, str, int, str]] = []

KINDS = {"kill -9": None, "disk full": errno.ENOSPC, "I/O error": errno.EIO}


def arm(root: Path, number: int, kind: str) -> Callable[[], bool]:
    """From now on this process fails at its operation `number` (from 1) on files below `root`.

    A file that torch writes is left half written, as a kill or a full disk leaves it.

    Returns a function that tells whether the operation has been reached.
    """
    seen = 0

    def fail(path: str) -> None:
        nonlocal seen
        seen += 1
        if seen != number:
            return
        if KINDS[kind] is None:
            os.kill(os.getpid(), signal.SIGKILL)
        raise OSError(KINDS[kind], f"{kind} at operation {number}", path)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event not in EVENTS or (event == "open" and not _writes(arguments)):
            return
        for path in arguments[: EVENTS[event]]:
            if isinstance(path, str | Path) and Path(path).is_relative_to(root):
                fail(str(path))
                return

    sys.addaudithook(hook)
    if "torch" in sys.modules:
        _break_torch_save(root, fail)
    return lambda: seen >= number


def _writes(arguments: tuple[Any, ...]) -> bool:
    _, mode, flags = arguments
    if isinstance(mode, str):
        return any(letter in mode for letter in "wax+")
    return bool(flags & WRITES)


def _break_torch_save(root: Path, fail: Callable[[str], None]) -> None:
    """torch opens its files itself, which Python's audit events do not show."""
    import torch

    save = torch.save

    def save_or_fail(what: Any, file: Any, *arguments: Any, **options: Any) -> None:
        save(what, file, *arguments, **options)
        if isinstance(file, str | Path) and Path(file).is_relative_to(root):
            size = os.stat(file).st_size
            whole = Path(file).read_bytes()
            os.truncate(file, size // 2)  # counted: the process may end here
            with open(file, "r+b") as stream:
                stream.write(whole)

    torch.save = save_or_fail


def run_with_fault(work: Callable[[], None], root: Path, number: int, kind: str) -> bool:
    """Does `work` in a forked process that fails at an operation.

    Returns whether the operation was reached.
    """
    child = os.fork()
    if child == 0:
        try:
            with open(os.devnull, "w") as null:
                os.dup2(null.fileno(), 2)
            has_failed = arm(root, number, kind)
            work()
        except BaseException:
            os._exit(1)
        os._exit(SURVIVED if has_failed() else 0)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status) != 0


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _zeros(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def _half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _one_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _text(content: str) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        path.write_text(content)

    return change


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _dangling(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.with_name("nothing"))


DAMAGES: dict[str, Callable[[Path], None]] = {
    "missing": Path.unlink,
    "empty": _empty,
    "zeros": _zeros,
    "half": _half,
    "one bit changed": _one_bit,
    "null": _text("null"),
    "{}": _text("{}"),
    "a list": _text("[1]"),
    "a folder": _folder,
    "a dangling link": _dangling,
}
# Those that leave a file, or nothing.
FILE_DAMAGES = {name: change for name, change in DAMAGES.items() if name != "a folder"}
