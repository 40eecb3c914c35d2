"""User errors: one clear message and exit code 2, never a traceback.

A message names the key or the row, the given value, the expected value and the fix. Any exception
that is not a `UserError` is a bug of torchprime and keeps its traceback.
"""

from __future__ import annotations

import errno

DISK_FAULTS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)
INTERRUPTED = 130  # exit code after Ctrl-C: 128 + SIGINT, as shells report it


class UserError(Exception):
    """A mistake in the user's input: configuration, data, weights, environment."""

    exit_code = 2


class ConfigError(UserError):
    """An unknown key, a wrong type, an impossible combination of values."""


class DataError(UserError):
    """Rows that are missing, malformed or reduced to nothing."""


class CheckpointError(UserError):
    """Weights or a tokenizer that are missing, partial or do not fit the model."""


class RuntimeSetupError(UserError):
    """A package, device or folder that the run needs and the host lacks."""


class DivergedError(UserError):
    """The loss or gradient norm became NaN or infinite; the weights before it are kept."""


class RecompileError(UserError):
    """A step was compiled again after warm-up, although all its shapes should be static."""


class StoppedError(UserError):
    """A requested stop: the run has saved its state and resumes at the next start.

    Its exit code (EX_TEMPFAIL) lets a scheduler distinguish it from failures and finished runs.
    """

    exit_code = 75


class IsolationError(UserError):
    """Segments of a packed block affect each other, or the proof of their isolation failed."""


def told_disk_fault(error: OSError) -> str | None:
    """Describe the fault of a disk that is full, worn out or read-only; None for any other error.

    Such a fault may come from any write, even inside a library that does not name the file.
    """
    if error.errno not in DISK_FAULTS:
        return None
    file = f"{error.filename} cannot be" if error.filename else "A file cannot be read or"
    return f"{file} written: {error.strerror}. Free some space there, or name another disk."
