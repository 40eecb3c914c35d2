"""User errors have an exit code, and a disk's fault becomes one message."""

from __future__ import annotations

import errno
import os

import pytest

from torchprime import errors
from torchprime.errors import StoppedError, UserError, told_disk_fault


def test_every_error_is_exit_2_but_a_requested_stop() -> None:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type)]
    assert len(kinds) > 5 and all(issubclass(kind, UserError) for kind in kinds)
    assert {kind.exit_code for kind in kinds if kind is not StoppedError} == {2}
    assert StoppedError.exit_code == os.EX_TEMPFAIL


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO])
def test_a_disks_fault_names_the_file_if_it_is_known(code: int) -> None:
    told = told_disk_fault(OSError(code, os.strerror(code), "/data/x"))
    assert told == (
        f"/data/x cannot be written: {os.strerror(code)}. Free some space there, or name another "
        "disk."
    )
    unnamed = told_disk_fault(OSError(code, os.strerror(code)))
    assert unnamed is not None and unnamed.startswith("A file cannot be read or written: ")


@pytest.mark.parametrize("code", [errno.ENOENT, errno.EACCES, None])
def test_another_error_is_no_disks_fault(code: int | None) -> None:
    assert told_disk_fault(OSError(code, "x") if code else OSError("x")) is None
