"""Versions of installed packages, by their metadata, and chips; no package is imported.

Three scripts ask for themselves, since they run where this package is not installed:
compiling/executables.py, generation/vllm_worker.py and experimental/vllm_tpu_deployment/engine.py.
"""

from __future__ import annotations

from collections.abc import Iterable
from glob import glob
from importlib import metadata


def installed_version(package: str) -> str | None:
    """Return the version of an installed package, None if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def installed_versions(packages: Iterable[str]) -> dict[str, str]:
    """Return the versions of those packages that are installed."""
    return {name: found for name in packages if (found := installed_version(name)) is not None}


def tpu_chips() -> list[str]:
    """Return this host's TPU chips, which show as accel or VFIO devices."""
    return glob("/dev/accel*") + glob("/dev/vfio/[0-9]*")


def only_torchtpu() -> bool:
    """Return True if torch-tpu is installed, and torch_xla is not."""
    return installed_version("torch-tpu") is not None and installed_version("torch_xla") is None
