"""vLLM as an engine of ours: token ids in, token ids out.

It runs in a process of its own environment (`OfflineVllm`), since it pins another torch, or is a
server on this machine (`ServedVllm`). Prompts are the ids that training makes, and answers end at
the same stop tokens, so greedy answers are those of a backend, up to rounding. Sampled ones have
vLLM's own noise, seeded for each answer.
"""

from __future__ import annotations

import hashlib
import ipaddress
import json
import os
import subprocess
import tempfile
import urllib.error
import urllib.parse
import urllib.request
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from torchprime.config.checks import refuse
from torchprime.errors import RuntimeSetupError
from torchprime.generation.decode import Answer, GenerateOptions
from torchprime.generation.vllm_process import INSTALL, engine_environment, last_error

WORKER = Path(__file__).with_name("vllm_worker.py")
AT_ONCE = 64  # requests that a server gets at a time
SECONDS = 600  # for one request
HAS_VLLM = "import importlib.util, sys; sys.exit(importlib.util.find_spec('vllm') is None)"

Settings = dict[str, Any]
Ids = Sequence[int]


class Vllm(ABC):
    """An engine that answers prompts and scores sequences of token ids."""

    version: str

    @abstractmethod
    def complete(
        self, prompts: Sequence[Ids], settings: Sequence[Settings]
    ) -> list[tuple[list[int], bool]]:
        """Return for each prompt the new ids, and True if a stop token, the last id, ended them.

        Args:
            settings: of each prompt, by the names of vLLM's SamplingParams.
        """

    @abstractmethod
    def logprobs(self, sequences: Sequence[Ids]) -> list[list[float]]:
        """Return for each sequence the log-probabilities, in nats, of its ids but the first."""

    def generate(self, prompts: Sequence[Ids], options: GenerateOptions) -> list[Answer]:
        """Return answers as a backend does (`training/backend.py`)."""
        numbers = options.numbers or range(len(prompts))
        pairs = zip(prompts, numbers, strict=True)
        settings = [settings_of(options, prompt, number) for prompt, number in pairs]
        return [
            Answer(ids[:-1] if stopped else ids, stopped)
            for ids, stopped in self.complete(prompts, settings)
        ]


def settings_of(options: GenerateOptions, prompt: Ids, number: int) -> Settings:
    """Return the sampling parameters of one prompt, by vLLM's names."""
    found: Settings = {
        "temperature": options.temperature,
        "max_tokens": options.room(prompt),
        "stop_token_ids": list(options.stop_ids),
        "ignore_eos": True,  # only our stop tokens end an answer
    }
    if options.sampled:
        digest = hashlib.sha256(f"{options.seed}:{number}".encode()).digest()
        seed = int.from_bytes(digest[:7], "big")
        found |= {"top_p": options.top_p, "top_k": options.top_k or 0, "seed": seed}
    return found


# In a process of its own --------------------------------------------------------------------------


def find_vllm(given: str | None) -> Path:
    """Return the python of vLLM's environment.

    Args:
        given: by the user; None for TORCHPRIME_VLLM_PYTHON, or .venv-vllm here.

    Raises:
        RuntimeSetupError: there is none, or it has no vLLM.
    """
    named = given or os.environ.get("TORCHPRIME_VLLM_PYTHON") or ".venv-vllm/bin/python"
    python = Path(named).expanduser().absolute()
    there = os.access(python, os.X_OK) and python.is_file()
    if there and subprocess.run([python, "-c", HAS_VLLM], capture_output=True).returncode == 0:
        return python
    found = f"{named} has no vLLM" if there else f"there is no {named}"
    raise RuntimeSetupError(
        f"--engine vllm: {found}. {INSTALL}\nThen name its python: --vllm-python "
        ".venv-vllm/bin/python. In a checkout `make .venv-vllm/.setup-done` makes that one."
    )


class OfflineVllm(Vllm):
    """A worker process with one loaded model; use it in a `with`.

    Args:
        python: of vLLM's environment.
        engine: arguments of vLLM's LLM.

    Raises:
        RuntimeSetupError: the engine ends; the message has its reason and names its log.
    """

    def __init__(self, python: Path, engine: Settings) -> None:
        handle, log = tempfile.mkstemp(prefix="vllm-", suffix=".log")
        self._log = Path(log)
        read, write = os.pipe()
        with os.fdopen(handle, "wb") as file:
            self._process = subprocess.Popen(
                [python, WORKER, str(write)],
                stdin=subprocess.PIPE,
                stdout=file,
                stderr=file,
                env={"VLLM_ENABLE_V1_MULTIPROCESSING": "0", **engine_environment("WARNING")},
                pass_fds=(write,),
            )
        os.close(write)
        self._answers = os.fdopen(read, encoding="utf-8")
        tokens = {"skip_tokenizer_init": True, "generation_config": "vllm"}
        self.version = self._ask({"engine": {**engine, **tokens}})["version"]

    def __enter__(self) -> OfflineVllm:
        return self

    def __exit__(self, *error: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._answers.close()
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
        if not any(error):
            self._log.unlink()

    def complete(
        self, prompts: Sequence[Ids], settings: Sequence[Settings]
    ) -> list[tuple[list[int], bool]]:
        lists = [{**each, "detokenize": False} for each in settings]
        found = self._ask({"prompts": list(map(list, prompts)), "sampling": lists})
        return [(each["ids"], each["stopped"]) for each in found["answers"]]

    def logprobs(self, sequences: Sequence[Ids]) -> list[list[float]]:
        return self._ask({"sequences": list(map(list, sequences))})["logprobs"]

    def _ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        line = ""
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
            line = self._answers.readline()
        except BrokenPipeError:
            pass
        if line.endswith("\n"):
            return json.loads(line)
        code = self._process.wait()
        raise RuntimeSetupError(
            f"vLLM ended with exit code {code}: {last_error(self._log)}\nAll it said is in "
            f"{self._log}"
        )


# A server -----------------------------------------------------------------------------------------


def check_url(url: str) -> str:
    """Return the URL of a server on this machine, without a slash at its end.

    Raises:
        ConfigError: no http URL, or one of another machine.
    """
    parts = urllib.parse.urlsplit(url)
    host = parts.hostname or ""
    try:
        loopback = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = False
    if parts.scheme != "http" or not loopback:
        refuse(
            "--url",
            url,
            "a server on this machine: rows are sent to no other",
            "Write http://127.0.0.1:8000/v1; from elsewhere go through ssh -L 8000:127.0.0.1:8000.",
        )
    return url.rstrip("/")


class ServedVllm(Vllm):
    """A running vLLM server with an OpenAI-compatible API.

    Args:
        url: as `check_url` returns it.
        name: the server's name of the model; None if it serves one.

    Raises:
        RuntimeSetupError: no server answers there, or one that returns no token ids.
        ConfigError: the server has no model of that name, or several and none was named.
    """

    def __init__(self, url: str, name: str | None) -> None:
        self.url = url
        # No proxy: the server is on this machine.
        self._open = urllib.request.build_opener(urllib.request.ProxyHandler({})).open
        names = [model["id"] for model in self._get("models")["data"]]
        if name is None and len(names) != 1 or name is not None and name not in names:
            refuse("--served-name", name, f"one of {', '.join(names)}", "Name the one to ask.")
        self.name = name or names[0]
        self.version = f"a server, model {self.name}"

    def complete(
        self, prompts: Sequence[Ids], settings: Sequence[Settings]
    ) -> list[tuple[list[int], bool]]:
        asked = [
            {"prompt": list(prompt), **each, "return_token_ids": True}
            for prompt, each in zip(prompts, settings, strict=True)
        ]
        found = []
        for choice in self._choices(asked):
            if choice.get("token_ids") is None:
                raise RuntimeSetupError(
                    f"--url: {self.url} returns no token ids, which are graded and counted. Use "
                    "vLLM 0.10.2 or newer."
                )
            found.append((choice["token_ids"], choice["finish_reason"] == "stop"))
        return found

    def logprobs(self, sequences: Sequence[Ids]) -> list[list[float]]:
        asked = [{"prompt": list(ids), "max_tokens": 1, "prompt_logprobs": 0} for ids in sequences]
        pairs = zip(sequences, self._choices(asked), strict=True)
        return [
            [
                given[str(token)]["logprob"]
                for token, given in zip(ids[1:], choice["prompt_logprobs"][1:], strict=True)
            ]
            for ids, choice in pairs
        ]

    def _choices(self, asked: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        with ThreadPoolExecutor(AT_ONCE) as pool:
            found = pool.map(lambda body: self._get("completions", body), asked)
            return [each["choices"][0] for each in found]

    def _get(self, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        data = None if body is None else json.dumps({"model": self.name, **body}).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{self.url}/{path}", data, headers)
        try:
            with self._open(request, timeout=SECONDS) as answer:
                return json.loads(answer.read())
        except urllib.error.HTTPError as error:
            reason = error.read(2000).decode(errors="replace")
            raise RuntimeSetupError(
                f"--url: {self.url} refused a request ({error.code}): {reason}"
            ) from error
        except (OSError, ValueError) as error:
            raise RuntimeSetupError(
                f"--url: no answer from {self.url}/{path} ({error}). Start the server (vllm serve "
                "MODEL --host 127.0.0.1 --port 8000), or correct the URL."
            ) from error
