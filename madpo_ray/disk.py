"""One message for a disk that is full, read-only or broken."""

import contextlib
import errno
import shutil
from collections.abc import Iterator
from pathlib import Path

from madpo_ray.errors import ExitCode, Stopped, UserError

DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ESTALE}


def find_disk_error(error: BaseException) -> OSError | None:
    """The error of a disk that is full, read-only or broken, in an exception's chain of causes."""
    seen: set[int] = set()
    todo: list[object] = [error]
    while todo:
        found = todo.pop(0)
        if not isinstance(found, BaseException) or id(found) in seen:
            continue
        seen.add(id(found))
        if isinstance(found, OSError) and found.errno in DISK_ERRORS:
            return found
        # `cause`: Ray's errors of tasks and actors.
        todo += [found.__cause__, found.__context__, getattr(found, "cause", None)]
    return None


@contextlib.contextmanager
def stopping_on_disk_errors(folder: Path) -> Iterator[None]:
    """Ends the command with one message if a disk is full, read-only or broken.

    Raises:
        Stopped: such an error in the block, or in a task of the block.
    """
    try:
        yield
    except (UserError, Stopped):
        raise
    except Exception as error:
        found = find_disk_error(error)
        if found is None:
            raise
        raise Stopped(explain_disk_error(found, folder), ExitCode.FAILED) from error


def explain_disk_error(error: OSError, folder: Path) -> str:
    """What happened, where, and how much space is left there."""
    where = error.filename or folder
    try:
        free = f"; {shutil.disk_usage(folder).free / 2**30:.2f} GiB are free in {folder}"
    except OSError:
        free = ""
    reason = error.strerror or str(error)
    return f"{where} cannot be read or written: {reason}{free}. The same command resumes"
