"""The TPU compiler on this host: libtpu, a library that needs no TPU to compile.

It may be installed like any package (the `tpu` extra), named by TPU_LIBRARY_PATH, or lie in the
folder `libtpu` of the virtual environment, where `make libtpu` puts it so that nothing else in the
environment changes.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from torchprime.config.topologies import Topology
from torchprime.errors import ConfigError, RuntimeSetupError

# The version for torch_xla 2.9.0. Memory figures and limits of kernels depend on it.
VERSION = "0.0.21"
# The package through which torch_xla calls Pallas kernels. torch_xla's wheel has an older copy,
# without metadata, that needs flax; an installed one replaces it.
TORCHAX = "0.0.7"
INSTALL = f"pip install --no-deps libtpu=={VERSION} torchax=={TORCHAX}"


def check_chip(slice_: Topology) -> None:
    """Check that the compiler knows a slice's chip.

    Raises:
        ConfigError: it does not.
    """
    if not slice_.chip.compiles:
        raise ConfigError(
            f"compile_only={slice_.name}: given a slice of {slice_.chip.name} chips, expected one "
            f"that libtpu {VERSION} knows; torch_xla 2.9.0 goes with that version, and it answers "
            "'Invalid TPU external name'. Set compile_only=v6e-8, for example."
        )


class Library(NamedTuple):
    """The compiler's file, and the other settings that a process needs to use it."""

    path: Path
    version: str
    python_path: tuple[str, ...]  # folders to import torchax from, before all others


def own_folder() -> Path:
    """Return the folder where `make libtpu` puts it."""
    return Path(sys.prefix) / "libtpu"


def find_library() -> Library:
    """Return libtpu of the matching version.

    Raises:
        RuntimeSetupError: there is none, it is of another version, or torchax is missing; with the
            command that installs it.
    """
    found = _candidates()
    if not found:
        raise RuntimeSetupError(
            f"libtpu, the TPU's compiler, is not installed; it runs on any x86 Linux host. Install "
            f"it with: {INSTALL}"
        )
    path = found[0]
    folder = path.parents[1]
    version = _version("libtpu", [folder])
    if version != VERSION:
        raise RuntimeSetupError(
            f"{path} is of version {version or 'unknown'}; torch_xla 2.9.0 goes with {VERSION}, "
            "and another version needs other amounts of memory. "
            f"Install it with: {INSTALL}"
        )
    places = [place for place in (sys.path, [str(folder)]) if _version("torchax", place)]
    if not places:
        raise RuntimeSetupError(
            "torchax, through which torch_xla calls the splash attention kernel, is not installed. "
            f"Install it with: pip install --no-deps torchax=={TORCHAX}"
        )
    return Library(path, version, () if places[0] is sys.path else (str(folder),))


def _candidates() -> list[Path]:
    named = os.environ.get("TPU_LIBRARY_PATH")
    spec = importlib.util.find_spec("libtpu")
    places = [
        *([Path(named)] if named else []),
        *([Path(spec.origin).parent / "libtpu.so"] if spec and spec.origin else []),
        own_folder() / "libtpu" / "libtpu.so",
    ]
    return [place for place in places if place.is_file()]


def _version(package: str, folders: Sequence[str | Path]) -> str | None:
    """Return the version of a package from its metadata in one of these folders."""
    found = metadata.distributions(name=package, path=[str(folder) for folder in folders])
    return next((each.version for each in found), None)
