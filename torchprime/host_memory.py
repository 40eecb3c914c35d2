"""The memory of this host that a process may still take."""

from __future__ import annotations

import os
import re
from pathlib import Path

MEMINFO = Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup")  # of a container, as it sees itself
AVAILABLE = re.compile(r"^MemAvailable:\s+(\d+) kB$", re.MULTILINE)
INACTIVE = re.compile(r"^inactive_file (\d+)$", re.MULTILINE)


def available_memory() -> int:
    """Return the bytes that can be taken without swapping, within the container's limit.

    Files that the kernel keeps in memory count as available: it drops them when asked for memory.
    Free memory alone is near zero on any host that has just read a model.
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
    """Return what a container may still take; None without a limit."""
    try:
        most = (CGROUP / "memory.max").read_text(encoding="ascii").strip()
        used = int((CGROUP / "memory.current").read_text(encoding="ascii"))
        droppable = INACTIVE.search((CGROUP / "memory.stat").read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None
    if not most.isdigit():  # max
        return None
    return int(most) - used + (int(droppable[1]) if droppable else 0)
