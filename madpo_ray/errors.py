"""Errors for users, exit codes, and spelling suggestions."""

import difflib
import enum
from collections.abc import Iterable


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
    INTERRUPTED = 130  # 128 + SIGINT, as shells say; the same command resumes
    TERMINATED = 143  # 128 + SIGTERM: saved; the same command resumes


class Stopped(Exception):  # noqa: N818 (most often not an error)
    """A command ended early: it was asked to, or cannot continue. `message` is for the terminal."""

    def __init__(self, message: str, exit_code: ExitCode) -> None:
        super().__init__(message, exit_code)
        self.message = message
        self.exit_code = exit_code


class StoppedForGood(Stopped):
    """What ran failed; with the same settings it would fail again."""


class StoppedFromOutside(Stopped):
    """The machines failed, not what ran: a disk, or no place for workers."""


def first_line(error: object) -> str:
    """Of an exception's text."""
    return str(error).strip().partition("\n")[0]


def did_you_mean(key: str, known: Iterable[str]) -> str:
    """Ending of an error message: `; did you mean 'x'?`, or all known keys if none is close."""
    candidates = sorted(known)
    matches = difflib.get_close_matches(key, candidates, n=1, cutoff=0.5)
    if matches:
        return f"; did you mean {matches[0]!r}?"
    return f"; choose from {', '.join(candidates)}"
