"""Two processes never share a run's folder, and a killed one leaves it free."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from torchprime.checkpoint.run.lock import LOCK, run_lock
from torchprime.errors import RuntimeSetupError

HOLDER = """
import os, sys, time
from pathlib import Path
from torchprime.checkpoint.run.lock import run_lock
with run_lock(Path(sys.argv[1])):
    child = 0
    if sys.argv[2] == "fork":
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            os.write(write, b"up")
            time.sleep(60)
            os._exit(0)
        os.read(read, 2)
    print(child, flush=True)
    time.sleep(60)
"""


@contextmanager
def holder(folder: Path, how: str = "alone") -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A process that holds the lock, and the id of a helper that it has forked."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder), how], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    child = int(process.stdout.readline())
    try:
        yield process, child
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_the_second_is_told_who_holds_it(tmp_path: Path) -> None:
    with holder(tmp_path) as (process, _):
        message = f"in use by process {process.pid} on {socket.gethostname()}.*run_name=NAME"
        with pytest.raises(RuntimeSetupError, match=message), run_lock(tmp_path):
            pass
        assert process.poll() is None, "the holder is left alone"
        process.send_signal(signal.SIGKILL)
        process.wait()
        with run_lock(tmp_path):  # a kill frees it, though the file is still there
            assert str(os.getpid()) in (tmp_path / LOCK).read_text()


def test_it_is_free_again_after_the_run_and_after_an_exception(tmp_path: Path) -> None:
    with (
        run_lock(tmp_path),
        pytest.raises(RuntimeSetupError, match=str(os.getpid())),
        run_lock(tmp_path),
    ):
        pass
    with pytest.raises(KeyError), run_lock(tmp_path):
        raise KeyError
    with run_lock(tmp_path):
        pass


def test_a_forked_helper_does_not_keep_it(tmp_path: Path) -> None:
    with holder(tmp_path, "fork") as (process, child):
        try:
            with pytest.raises(RuntimeSetupError, match="in use"), run_lock(tmp_path):
                pass
            process.kill()
            process.wait()
            os.kill(child, 0)  # the helper lives on
            with run_lock(tmp_path):
                pass
        finally:
            os.kill(child, signal.SIGKILL)


def test_a_lie_in_the_file_decides_nothing(tmp_path: Path) -> None:
    (tmp_path / LOCK).write_text('{"pid": 1, "host": "other", "since": "2099-01-01"}')
    with run_lock(tmp_path):
        pass
    (tmp_path / LOCK).write_text("")
    with holder(tmp_path):
        (tmp_path / LOCK).write_text("garbage")
        with pytest.raises(RuntimeSetupError, match="by another process"), run_lock(tmp_path):
            pass


def test_no_folder_and_no_locks_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeSetupError, match="can't be written"), run_lock(tmp_path / "absent"):
        pass

    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with pytest.raises(RuntimeSetupError, match="has no locks"), run_lock(tmp_path):
        pass
