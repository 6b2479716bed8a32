"""Errors for users, exit codes, spelling suggestions, and errors of a disk."""

import contextlib
import difflib
import enum
import errno
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path


class UserError(Exception):
    """The user's input or config is wrong. The message names the fix.

    The command prints the message without a traceback and exits with code 2.
    """


class ExitCode(enum.IntEnum):
    """What a command returns."""

    DONE = 0
    FAILED = 1
    USER_ERROR = 2
    OUT_OF_TIME = 75  # EX_TEMPFAIL of sysexits.h: saved; the same command resumes
    TERMINATED = 143  # 128 + SIGTERM: saved; the same command resumes


class Stopped(Exception):  # noqa: N818 (most often not an error)
    """A command ended early: it was asked to, or cannot continue. `message` is for the terminal."""

    def __init__(self, message: str, exit_code: ExitCode) -> None:
        super().__init__(message, exit_code)
        self.message = message
        self.exit_code = exit_code


def did_you_mean(key: str, known: Iterable[str]) -> str:
    """Ending of an error message: `; did you mean 'x'?`, or all known keys if none is close."""
    candidates = sorted(known)
    matches = difflib.get_close_matches(key, candidates, n=1, cutoff=0.5)
    if matches:
        return f"; did you mean {matches[0]!r}?"
    return f"; known are {', '.join(candidates)}"


# A disk that is full, read-only or broken.
WRITE_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ESTALE}


def find_write_error(error: BaseException) -> OSError | None:
    """The error of a disk that is full, read-only or broken, in an exception's chain of causes."""
    seen: set[int] = set()
    todo: list[object] = [error]
    while todo:
        found = todo.pop(0)
        if not isinstance(found, BaseException) or id(found) in seen:
            continue
        seen.add(id(found))
        if isinstance(found, OSError) and found.errno in WRITE_ERRORS:
            return found
        # `cause`: Ray's errors of tasks and actors.
        todo += [found.__cause__, found.__context__, getattr(found, "cause", None)]
    return None


@contextlib.contextmanager
def ending_on_write_errors(folder: Path) -> Iterator[None]:
    """Ends the command with one message if a disk is full, read-only or broken.

    Raises:
        Stopped: such an error in the block, or in a task of the block.
    """
    try:
        yield
    except (UserError, Stopped):
        raise
    except Exception as error:
        found = find_write_error(error)
        if found is None:
            raise
        raise Stopped(explain_write_error(found, folder), ExitCode.FAILED) from error


def explain_write_error(error: OSError, folder: Path) -> str:
    """What happened, where, and how much space is left there."""
    where = error.filename or folder
    try:
        free = f"; {shutil.disk_usage(folder).free / 2**30:.2f} GiB are free in {folder}"
    except OSError:
        free = ""
    reason = error.strerror or str(error)
    return f"{where} cannot be read or written: {reason}{free}. The same command resumes"
