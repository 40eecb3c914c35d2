"""Modules named torchvision without content, for every process of vLLM's environment.

transformers is asked first whether torchvision is there, so it goes on without it.
"""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

from transformers.utils.import_utils import is_torchvision_available

NAMES = ("torchvision", "transforms", "v2", "functional")


class Empty(ModuleType):
    """A module in which every name is None."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__path__ = []

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


if not is_torchvision_available():
    for depth in range(1, len(NAMES) + 1):
        path = ".".join(NAMES[:depth])
        sys.modules[path] = module = Empty(path)
        module.__spec__ = ModuleSpec(path, None, is_package=True)
        if depth > 1:
            setattr(sys.modules[path.rpartition(".")[0]], NAMES[depth - 1], module)
