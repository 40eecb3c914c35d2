"""The engine of commands whose model answers rows."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from torchprime.cli.shared.arguments import positive
from torchprime.cli.shared.backends import NAMES, MakeBackend, choose_backend, with_backend
from torchprime.config.checks import refuse
from torchprime.config.paths import name_or_folder
from torchprime.config.schema import TrainConfig
from torchprime.text.terminal import say

if TYPE_CHECKING:
    from torchprime.training.inference.engine import OpenEngine

VLLM = "vllm"
OF_VLLM = ("vllm_python", "url", "served_name", "tensor_parallel_size")
URL = "http://127.0.0.1:8000/v1"


def add_engine_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that `with_engine` reads."""
    add = parser.add_argument
    add("--engine", choices=(*NAMES, VLLM), help="instead of the one that fits this host")
    add(
        "--vllm-python",
        metavar="FILE",
        help="of vLLM's environment (default: TORCHPRIME_VLLM_PYTHON, .venv-vllm/bin/python)",
    )
    add("--tensor-parallel-size", type=positive, metavar="N", help="devices of vLLM (default: 1)")
    add("--url", metavar="URL", help=f"instead, a vLLM server on this machine, such as {URL}")
    add("--served-name", metavar="NAME", help="the server's name of MODEL, if it serves several")


def model_argument(given: argparse.Namespace) -> str:
    """Return the model that a command is given.

    Raises:
        ConfigError: an override in its place, or a path as `checked_path` refuses it.
    """
    if "=" in given.model and not os.path.lexists(given.model):
        refuse(
            "MODEL",
            given.model,
            "a folder or a hub name before the overrides",
            "Write the model first.",
        )
    return name_or_folder("MODEL", given.model)


def with_engine(
    config: TrainConfig, given: argparse.Namespace, use: Callable[[OpenEngine], None]
) -> None:
    """Print which engine answers, and call `use` with what opens it.

    Raises:
        ConfigError: flags that contradict each other.
        RuntimeSetupError: an engine that is not installed.
    """
    given_flags = [name for name in OF_VLLM if getattr(given, name) is not None]
    if given.engine == VLLM:
        return _with_vllm(given, given_flags, use)
    for name in given_flags:
        refuse(_flag(name), getattr(given, name), "--engine vllm beside it", "Add it.")

    def run(make_backend: MakeBackend) -> None:
        # late: transformers looks for torch_xla when imported, and imports it
        from torchprime.training.inference.engine import on_backend

        use(partial(on_backend, make_backend=make_backend))

    with_backend(config, choose_backend(given.engine, None, "--engine", config.device), run)


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _with_vllm(
    given: argparse.Namespace, flags: list[str], use: Callable[[OpenEngine], None]
) -> None:
    offline = [name for name in flags if name in ("vllm_python", "tensor_parallel_size")]
    if given.url is not None and offline:
        refuse(_flag(offline[0]), getattr(given, offline[0]), "nothing beside --url", "Remove it.")
    if given.url is None and given.served_name is not None:
        refuse("--served-name", given.served_name, "--url beside it", f"Add --url {URL}.")
    os.environ["USE_TORCH_XLA"] = "0"  # transformers would start XLA if it is installed
    # late: they need torch and transformers, which looks for torch_xla when imported
    from torchprime.generation.vllm_engine import check_url, find_vllm
    from torchprime.training.inference.engine import VllmRequest, on_vllm

    if given.url is None:
        python = find_vllm(given.vllm_python)
        request = VllmRequest(python=python, devices=given.tensor_parallel_size or 1)
        say(f"engine vllm: {python}")
    else:
        request = VllmRequest(url=check_url(given.url), name=given.served_name)
        say(f"engine vllm: {request.url}")
    use(partial(on_vllm, request=request))
