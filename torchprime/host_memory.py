"""The host memory that is available to a process."""

from __future__ import annotations

import os
import re
from pathlib import Path

MEMINFO = Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup")  # of a container, as seen from inside
AVAILABLE = re.compile(r"^MemAvailable:\s+(\d+) kB$", re.MULTILINE)
INACTIVE = re.compile(r"^inactive_file (\d+)$", re.MULTILINE)


def available_memory() -> int:
    """Return the bytes available without swapping, within the container's limit.

    The kernel's page cache counts as available: the kernel frees it on demand. Free memory alone is
    near zero on any host that has just read a model.
    """
    try:
        found = AVAILABLE.search(MEMINFO.read_text(encoding="ascii"))
    except OSError:  # no Linux
        found = None
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    available = free if found is None else int(found[1]) * 1024
    limit = _left_of_the_limit()
    return available if limit is None else max(0, min(available, limit))


def _left_of_the_limit() -> int | None:
    """Return the bytes that a container has left; None without a limit."""
    try:
        most = (CGROUP / "memory.max").read_text(encoding="ascii").strip()
        used = int((CGROUP / "memory.current").read_text(encoding="ascii"))
        droppable = INACTIVE.search((CGROUP / "memory.stat").read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None
    if not most.isdigit():  # the text is "max"
        return None
    return int(most) - used + (int(droppable[1]) if droppable else 0)
