"""The engine of commands whose model answers rows."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from torchprime.cli.shared.backends import NAMES, MakeBackend, choose_backend, with_backend
from torchprime.config.checks import refuse
from torchprime.config.paths import name_or_folder
from torchprime.config.schema import TrainConfig

if TYPE_CHECKING:
    from torchprime.training.inference.engine import OpenEngine


def add_engine_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that `with_engine` reads."""
    help = "instead of the backend that fits this host"
    parser.add_argument("--engine", choices=list(NAMES), help=help)


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
        RuntimeSetupError: an engine that is not installed.
    """

    def run(make_backend: MakeBackend) -> None:
        # late: transformers looks for torch_xla when imported, and imports it
        from torchprime.training.inference.engine import on_backend

        use(partial(on_backend, make_backend=make_backend))

    with_backend(config, choose_backend(given.engine, None, "--engine"), run)
