"""One message for a disk that is full, read-only or broken."""

import contextlib
import errno
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from madpo_ray.errors import ExitCode, Stopped, UserError

# In texts: of Rust, and of Python and Arrow inside an error that Ray has passed on.
ERROR_NUMBER = re.compile(r"(?:\(os error |\[[Ee]rrno )(\d+)")
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
        # safetensors and tokenizers are written in Rust: their errors are text. Of what a function
        # of Ray Data raises, only the traceback's text arrives.
        for number in map(int, ERROR_NUMBER.findall(str(found))):
            if number in DISK_ERRORS:
                return OSError(number, os.strerror(number))
        # `cause`: Ray's errors of tasks and actors.
        todo += [found.__cause__, found.__context__, getattr(found, "cause", None)]
    return None


def find_write_error(error: BaseException) -> OSError | None:
    """`find_disk_error`, for what torch's own writer may have raised, too."""
    found = find_disk_error(error)
    if found is None and "inline_container" in str(error):
        # It names neither file nor reason; the free space that is reported shows which it was.
        return OSError(errno.EIO, "torch could not write the file")
    return found


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
        free = f"; {in_units(shutil.disk_usage(folder).free)} are free in {folder}"
    except OSError:
        free = ""
    reason = error.strerror or str(error)
    return f"{where} cannot be read or written: {reason}{free}. The same command resumes"


def in_units(num_bytes: int) -> str:
    """A number of bytes for a message: in GiB, or in MiB if there are few."""
    return f"{num_bytes / 2**30:.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.1f} MiB"
