"""Greedy answers of 1, 2 and 4 processes equal transformers' generate; training goes on as ever."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "torch_xla_models"))

import answers  # noqa: E402

from torchprime.generation.decode import Answer  # noqa: E402

WORKER = Path(__file__).parent / "generate_worker.py"
WAYS: dict[str, Any] = {
    "alone-compiled": pytest.param(
        (1, {"mesh": {}, "model": "mistral", "compiler": "aot_eager"}), marks=pytest.mark.slow
    ),
    "fsdp2-remat": (2, {"mesh": {"fsdp": 2}, "model": "qwen2", "remat": "full"}),
    "fsdp2-gemma2": pytest.param(
        (2, {"mesh": {"fsdp": 2}, "model": "gemma2"}), marks=pytest.mark.slow
    ),
    "fsdp2-gemma3": pytest.param(
        (2, {"mesh": {"fsdp": 2}, "model": "gemma3"}), marks=pytest.mark.slow
    ),
    "tensor2": pytest.param((2, {"mesh": {"tensor": 2}, "model": "qwen3"}), marks=pytest.mark.slow),
    "tensor2-phi3": pytest.param(
        (2, {"mesh": {"tensor": 2}, "model": "phi3"}), marks=pytest.mark.slow
    ),
    "fsdp2-tensor2-gathered-each-time": pytest.param(
        (4, {"mesh": {"fsdp": 2, "tensor": 2}, "model": "llama-tied", "keeps": False}),
        marks=pytest.mark.slow,
    ),
}


@pytest.mark.parametrize("way", WAYS.values(), ids=list(WAYS))
def test_greedy_equals_transformers_between_steps(way: tuple[int, dict], tmp_path: Path) -> None:
    """The worker itself looks whether training and checkpoints stay as they are."""
    processes, how = way
    model = answers.make_model(how["model"])
    free = answers.expected(model, answers.prompts(), answers.options())
    stops = answers.some_stops(free)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*launch, f"--nproc_per_node={processes}", str(WORKER), str(tmp_path)]
    done = subprocess.run(
        [*command, json.dumps(how | {"stops": stops})],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "found.json").read_text())
    assert [Answer(*a) for a in found["free"]] == free
    assert [Answer(*a) for a in found["stopped"]] == answers.cut(free, stops)
    assert found["sampled"] != found["free"]
