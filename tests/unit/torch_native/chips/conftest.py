"""Modules that these tests share with those of the step."""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "tpu"), str(HERE.parents[2] / "parity")]
