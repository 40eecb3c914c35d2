"""Another version of the TPU compiler, in a Python environment of its own.

torch_xla 2.9.0 goes with libtpu 0.0.21. A newer libtpu compiles the same module, if it is handed
over in jax's portable format: a runtime's worker saves it, and executables.py compiles it, run by
the Python of the other environment. `make libtpu-new` makes such an environment.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torchprime.compiling.apart import run_apart
from torchprime.errors import RuntimeSetupError
from torchprime.files.atomic import make_folder

KEY = "compile_libtpu"
MAKE = "Make one with `make libtpu-new`, and set compile_libtpu=.venv/libtpu-new."
# The oldest jax that reads what jax 0.7.1 writes.
OLDEST_JAX = (0, 7, 1)
# A flag that newer versions no longer have; libtpu ends its process at an unknown one.
DROPPED_FLAGS = ("xla_tpu_enable_flash_attention",)
_ASK = """
import json
from importlib import metadata
found = {}
for name in ("jax", "jaxlib", "libtpu"):
    try:
        found[name] = metadata.version(name)
    except metadata.PackageNotFoundError:
        found[name] = None
found["requires"] = (metadata.requires("jax") or []) if found["jax"] else []
print(json.dumps(found))
"""


class OtherCompiler(NamedTuple):
    """A Python environment with jax and libtpu."""

    python: Path
    jax: str
    libtpu: str


def find_other(given: str) -> OtherCompiler:
    """Return the compiler of an environment.

    Args:
        given: the environment's folder.

    Raises:
        RuntimeSetupError: it is no environment, has no jax or libtpu, or versions that do not fit
            together.
    """
    python = Path(given).expanduser().absolute() / "bin" / "python"
    if not os.access(python, os.X_OK):
        raise RuntimeSetupError(
            f"{KEY}: given {given!r}, expected the folder of a Python environment; there is no "
            f"{python}. {MAKE}"
        )
    asked = subprocess.run([python, "-I", "-c", _ASK], capture_output=True, text=True, check=False)
    if asked.returncode != 0:
        said = (asked.stderr.strip().splitlines() or ["nothing"])[-1]
        raise RuntimeSetupError(f"{KEY}: {python} does not run; it says: {said}. {MAKE}")
    found = json.loads(asked.stdout)
    missing = [name for name in ("jax", "jaxlib", "libtpu") if found[name] is None]
    if missing:
        raise RuntimeSetupError(
            f"{KEY}: given {given!r}, expected an environment with jax and libtpu; "
            f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed there. "
            f"{MAKE}"
        )
    if (fault := _misfit(found)) is not None:
        raise RuntimeSetupError(f"{KEY}: given {given!r}, {fault}. {MAKE}")
    return OtherCompiler(python, found["jax"], found["libtpu"])


def _misfit(found: Mapping[str, Any]) -> str | None:
    """Return a description of versions that do not fit, None if they do."""
    jax = found["jax"]
    if _numbers(jax) < OLDEST_JAX:
        oldest = ".".join(map(str, OLDEST_JAX))
        return f"expected jax {oldest} or newer, which reads the step's module; it has {jax}"
    # jax is tested with one libtpu, and works with newer ones.
    for name, relation in (("jaxlib", "<=|>=|=="), ("libtpu", ">=|==")):
        for comparison, limit in _conditions(found["requires"], name, relation):
            given, bound = _numbers(found[name]), _numbers(limit)
            low = given < bound and comparison != "<="
            high = given > bound and comparison == "<="
            if low or high:
                least = "at most" if high else "at least"
                return (
                    f"expected {name} of {least} {limit}, which goes with jax {jax}; "
                    f"it has {found[name]}"
                )
    return None


def _conditions(requires: list[str], name: str, relation: str) -> list[tuple[str, str]]:
    """Return the conditions (comparison, version) that jax sets for a package; for libtpu those of
    its extra `tpu`."""
    for each in requires:
        package, _, condition = each.partition(";")
        if re.match(rf"{name}\b", package) and ("extra" not in condition or '"tpu"' in condition):
            return re.findall(rf"({relation})\s*(\d+(?:\.\d+)*)", package)
    return []


def _numbers(version: str) -> tuple[int, ...]:
    """Return the first three numbers of a version."""
    return tuple(int(n) for n in re.findall(r"\d+", version)[:3])


def compile_with(
    other: OtherCompiler,
    request: Mapping[str, Any],
    env: Mapping[str, str],
    folder: Path,
    limit_s: float,
) -> dict[str, Any]:
    """Compile a module by the other version and return its result.

    Args:
        request: as executables.py reads it.
        env: the environment of its process.
        folder: the place for the program; made here.

    Raises:
        RuntimeSetupError: over the time limit, or the process ended without a result.
    """
    make_folder(folder)
    script = Path(__file__).with_name("executables.py")
    command = [str(other.python), "-I", str(script)]
    return run_apart(command, request, env, folder, limit_s)


def known_flags(flags: str) -> str:
    """Return LIBTPU_INIT_ARGS without the flags that newer versions do not know."""
    given = flags.split()
    return " ".join(f for f in given if f.removeprefix("--").split("=")[0] not in DROPPED_FLAGS)
