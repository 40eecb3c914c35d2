"""A disk that becomes read-only in the middle of a test."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

PATIENCE = 60.0  # seconds


def make_read_only(disk: Path) -> None:
    """Remount a disk without the right to write.

    The kernel refuses that while a file is open for writing, and a checkpoint may still be written
    in the background: so this waits for it.

    Raises:
        AssertionError: the disk was still busy after PATIENCE.
    """
    command, end = ["mount", "-o", "remount,ro", str(disk)], time.monotonic() + PATIENCE
    while (mount := subprocess.run(command, capture_output=True, text=True)).returncode:
        assert "busy" in mount.stderr and time.monotonic() < end, mount.stderr
        time.sleep(0.05)
