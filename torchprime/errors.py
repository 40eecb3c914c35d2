"""What a user's mistake becomes: one clear message and exit code 2, never a traceback.

A message names the key or the row, what was given, what was expected and how to fix it. Anything
that is not a `UserError` is our own bug and keeps its traceback.
"""

from __future__ import annotations

import errno

DISK_FAULTS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)
INTERRUPTED = 130  # exit code after Ctrl-C: 128 + SIGINT, as shells report it


class UserError(Exception):
    """A mistake in what the user gave: configuration, data, weights, environment."""

    exit_code = 2


class ConfigError(UserError):
    """An unknown key, a wrong type, an impossible combination of values."""


class DataError(UserError):
    """Rows that are missing, malformed or reduced to nothing."""


class CheckpointError(UserError):
    """Weights or a tokenizer that are missing, partial or do not fit the model."""


class RuntimeSetupError(UserError):
    """A package, device or folder that the run needs and the host does not give."""


class DivergedError(UserError):
    """The loss or gradient norm became NaN or infinite; the weights before it are kept."""


class RecompileError(UserError):
    """A step compiled again after warm-up, though everything in it should be static."""


class StoppedError(UserError):
    """Not a mistake: the run was asked to stop, saved what it has, and goes on when started again.

    Its exit code (EX_TEMPFAIL) tells a scheduler from failures and from a finished run.
    """

    exit_code = 75


class IsolationError(UserError):
    """Segments of a packed block see each other, or the proof that they do not failed."""


def told_disk_fault(error: OSError) -> str | None:
    """Word the fault of a disk that is full, worn out or read-only; None for any other error.

    Such a fault may come from any write, also inside of a library that does not name the file.
    """
    if error.errno not in DISK_FAULTS:
        return None
    file = f"{error.filename} cannot be" if error.filename else "A file cannot be read or"
    return f"{file} written: {error.strerror}. Free some space there, or name another disk."
