"""Programs that another process compiles and dumps."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def run_and_dump(code: str, folder: Path, devices: int) -> tuple[str, list[str]]:
    """Run Python code on virtual devices; return its output, and the partitioned programs that it
    compiled, in their order."""
    environment = {
        **os.environ,
        "CPU_NUM_DEVICES": str(devices),
        "XLA_FLAGS": f"--xla_dump_to={folder} --xla_dump_hlo_as_text",
    }
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    texts = [path.read_text() for path in sorted(folder.glob("*after_optimizations.txt"))]
    return done.stdout, texts
