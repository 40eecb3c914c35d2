"""`torchprime evaluate` and `sample` with the real vLLM, against the native backend.

The shipped base answers the shipped rows. vLLM has an environment of its own (`make test-vllm`
makes it).
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

REPO = Path(__file__).resolve().parents[2]
SERVE = REPO / "experimental" / "vllm_tpu_deployment" / "engine.py"
PYTHON = Path(os.environ.get("TORCHPRIME_VLLM_PYTHON") or REPO / ".venv-vllm" / "bin" / "python")
BASE = REPO / "torchprime" / "assets" / "quickstart" / "base"
CONFIG = (
    "--config-name", "quickstart", "mesh=single", "dataset.max_train_examples=64",
    "dataset.leak_check=off", "eval.max_examples=24", "eval.generate.max_examples=12",
    "eval.generate.max_new_tokens=24", "eval.generate.batch_size=12",
)  # fmt: skip

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not PYTHON.exists(), reason=f"no {PYTHON}: run make test-vllm"),
]


def torchprime(*argv: object, code: int = 0) -> None:
    ours = ("XLA_FLAGS", "PJRT_DEVICE", "CPU_NUM_DEVICES", "USE_TORCH_XLA")
    kept = {key: value for key, value in os.environ.items() if key not in ours}
    kept |= {"VLLM_CPU_KVCACHE_SPACE": "1", "TORCH_COMPILE_DISABLE": "1"}
    kept |= {"TORCHPRIME_VLLM_PYTHON": str(PYTHON), "PYTHONPATH": str(REPO)}
    command = [sys.executable, "-m", "torchprime.cli.main", *map(str, argv)]
    ended = subprocess.run(command, cwd=REPO, capture_output=True, text=True, env=kept)
    assert ended.returncode == code, ended.stderr[-3000:]


def evaluated(model: Path, out: Path, *flags: object) -> tuple[dict[str, Any], bytes]:
    torchprime("evaluate", model, "--out", out, *flags, *CONFIG)
    content = json.loads((out / "evaluation.json").read_text())
    return content["evaluation"], (out / "samples.jsonl").read_bytes()


def require_equal(found: tuple[dict[str, Any], bytes], truth: tuple[dict[str, Any], bytes]) -> None:
    assert found[1] == truth[1]
    assert found[0]["scores"] == truth[0]["scores"]
    assert found[0]["eval_loss"] == pytest.approx(truth[0]["eval_loss"], rel=1e-5)


@pytest.fixture(scope="module")
def of_base(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], bytes]:
    return evaluated(BASE, tmp_path_factory.mktemp("native") / "out", "--engine", "native")


def test_greedy_answers_and_loss_are_those_of_a_backend(of_base, tmp_path: Path) -> None:
    require_equal(evaluated(BASE, tmp_path / "out", "--engine", "vllm"), of_base)


@pytest.fixture
def url(tmp_path: Path) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [PYTHON, SERVE, "serve", BASE, "--host", "127.0.0.1", "--port", str(port)]
    settings = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "TORCH_COMPILE_DISABLE": "1"}
    settings.pop("PYTHONPATH", None)
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            [*command, "--dtype", "float32", "--max-model-len", "512"],
            stdout=log, stderr=log, env=settings, start_new_session=True,
        )  # fmt: skip
    try:
        for _ in range(300):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except OSError:
                assert process.poll() is None, (tmp_path / "log").read_text()[-3000:]
                time.sleep(1)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(60)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


def test_a_server_answers_the_same(of_base, url: str, tmp_path: Path) -> None:
    require_equal(evaluated(BASE, tmp_path / "out", "--engine", "vllm", "--url", url), of_base)


def test_samples_do_not_depend_on_the_batch(tmp_path: Path) -> None:
    """The base never ends an answer, so none is kept, and the command says so."""
    digit = "eval.graders=[{name: digit, kind: regex, pattern: '[0-4]'}]"
    files = []
    for size in (12, 30):
        out = tmp_path / str(size)
        flags = ["--engine", "vllm", "--answers", 3, "--limit", 10, "--max-new-tokens", 24]
        torchprime("sample", BASE, "--out", out, *flags, *CONFIG, digit,
                   f"eval.generate.batch_size={size}", "selection.gates=[]",
                   "selection.ranking=[eval_loss asc]", code=2)  # fmt: skip
        files.append((out / "samples.jsonl").read_bytes())
    assert files[0] == files[1]
    outputs = [json.loads(line)["output"] for line in files[0].splitlines()]
    assert len(outputs) == 30 and len(set(outputs)) > 10
