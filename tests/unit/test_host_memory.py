"""Memory that may be taken: what the kernel says is available, within a container's limit."""

from __future__ import annotations

from pathlib import Path

import pytest

from torchprime import host_memory
from torchprime.host_memory import available_memory

GIB = 2**30
MEMINFO = """MemTotal:       {total} kB
MemFree:        {free} kB
MemAvailable:   {available} kB
Buffers:              12 kB
"""


def test_the_kernels_own_word_is_taken() -> None:
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    told = int(lines["MemAvailable"].split()[0]) * 1024
    assert available_memory() == pytest.approx(told, rel=0.1)


@pytest.mark.parametrize(
    ("limit", "used", "stat", "expected"),
    [
        (None, None, None, 20),
        ("max", 3, 1, 20),
        (8 * GIB, 3, 1, 6),
        (64 * GIB, 3, 1, 20),
        (2 * GIB, 3, 0, 0),
        ("nonsense", 3, 1, 20),
    ],
)
def test_files_kept_in_memory_are_available_and_a_limit_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit, used, stat, expected: int
) -> None:
    """A host with 1 GiB free of 32, where 19 more hold files that were just read."""
    kib = {"total": 32 * 2**20, "free": 2**20, "available": 20 * 2**20}
    (tmp_path / "meminfo").write_text(MEMINFO.format(**kib))
    if limit is not None:
        (tmp_path / "memory.max").write_text(f"{limit}\n")
        (tmp_path / "memory.current").write_text(f"{used * GIB}\n")
        (tmp_path / "memory.stat").write_text(f"anon 5\ninactive_file {stat * GIB}\nslab 1\n")
    monkeypatch.setattr(host_memory, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(host_memory, "CGROUP", tmp_path)
    assert available_memory() == expected * GIB
