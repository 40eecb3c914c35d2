"""Workers in other environments: vLLM's, or transformers 4.57 on the path."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
VLLM = Path(os.environ.get("TORCHPRIME_VLLM_PYTHON") or REPO / ".venv-vllm" / "bin" / "python")
VLLM_SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "TORCH_COMPILE_DISABLE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}


def run_worker(*command: object, work: Path, settings: Mapping[str, str]) -> None:
    """Run a worker of another environment, without our settings of XLA."""
    ours = ("PYTHONPATH", "XLA_FLAGS", "PJRT_DEVICE", "CPU_NUM_DEVICES")
    kept = {key: value for key, value in os.environ.items() if key not in ours}
    env = {**kept, "HF_HUB_OFFLINE": "1", **settings}
    words = [str(word) for word in command]
    done = subprocess.run(words, capture_output=True, text=True, env=env, cwd=work)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
