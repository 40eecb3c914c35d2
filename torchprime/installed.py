"""Versions of installed packages, by their metadata; no package is imported.

Three scripts ask for themselves, since they run where this package is not installed:
compiling/executables.py, generation/vllm_worker.py and experimental/vllm_tpu_deployment/engine.py.
"""

from __future__ import annotations

from collections.abc import Iterable
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
