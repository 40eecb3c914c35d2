"""`torchprime doctor`: the capabilities of this host, and their faults.

Package versions are compared with the requirements of this package. Devices are counted where the
system lists them. Checks that need no run are executed: XLA on virtual devices, and the TPU's
compiler on a small step. Each finding is a line with `ok`, `none` or `PROBLEM`; the exit code is
for scripts. With --json the findings, all versions and the devices are one JSON object.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from typing import NamedTuple

import torch
from packaging.requirements import Requirement

from torchprime import __version__
from torchprime.cli.shared.arguments import make_parser, run_command
from torchprime.config.compose import compose_config
from torchprime.errors import UserError
from torchprime.installed import installed_version, installed_versions, tpu_chips
from torchprime.text.terminal import print_json, print_lines, say
from torchprime.torch_native.tpu.environment import check_environment
from torchprime.torch_xla_models.compile.command import compile_only
from torchprime.torch_xla_models.compile.library import find_library
from torchprime.torch_xla_models.runtime import host_has_tpu

OK, NONE, PROBLEM = "ok", "none", "PROBLEM"
# Extras whose packages are checked if installed, by the runtime for TPUs; the others are for
# development.
XLA, TORCHTPU = "torch_xla", "torch-tpu"
EXTRAS = {XLA: ("xla", "tpu", "gpu"), TORCHTPU: ("torchtpu", "gpu")}
# Packages whose versions change what a run computes, or whether it starts.
PACKAGES = (
    "torch", "torch_xla", "torch-tpu", "jax", "jaxlib", "libtpu", "torchax", "transformers",
    "tokenizers", "datasets", "huggingface_hub", "safetensors", "numpy", "hydra-core", "flash-attn",
    "liger-kernel", "vllm",
)  # fmt: skip
VIRTUAL = """
import torch, torch_xla, torch_xla.runtime as xr, torch_xla.distributed.spmd as xs, numpy as np
xr.use_spmd()
x = torch.arange(8.0).to("xla")
xs.mark_sharding(x, xs.Mesh(np.arange(4), (4,), ("fsdp",)), ("fsdp",))
assert xr.global_runtime_device_count() == 4 and x.sum().item() == 28.0
"""


class Finding(NamedTuple):
    """One line of the report."""

    what: str
    state: str
    detail: str


def misfits(
    requirements: list[str], installed: Callable[[str], str | None], extras: Sequence[str]
) -> list[str]:
    """Return packages whose version does not meet the requirement, as `have: want` sentences.

    Args:
        requirements: as in a package's metadata, with markers.
        installed: returns the version of a package, None if it is not installed.
        extras: names of the extras whose packages are checked if they are installed.
    """
    found = []
    for text in requirements:
        needed = Requirement(text)
        every = ("", *extras)
        if needed.marker and not any(needed.marker.evaluate({"extra": e}) for e in every):
            continue
        version = installed(needed.name)
        optional = re.search(r"extra\s*==", text) is not None
        if version is None and not optional:
            found.append(f"{needed.name} is missing, {needed.specifier or 'any version'} is needed")
        elif version is not None and not needed.specifier.contains(version, prereleases=True):
            found.append(f"{needed.name} is {version}, {needed.specifier} is needed")
    return sorted(set(found))


def runtime() -> Iterator[Finding]:
    """Say which runtime for TPUs this environment has, and what does not fit it."""
    what = "runtime"
    there = [name for name in (XLA, TORCHTPU) if installed_version(name)]
    named = " and ".join(f"{name} {installed_version(name)}" for name in there)
    if not there:
        yield Finding(what, NONE, "neither torch_xla (extra tpu) nor torch-tpu (extra torchtpu)")
        return
    if TORCHTPU in there:
        try:
            check_environment(installed_version)
        except UserError as error:
            yield Finding(what, PROBLEM, str(error))
            return
        named += ", never run on a TPU by this package's authors"
    yield Finding(what, OK, named)


def versions() -> Iterator[Finding]:
    """Check the versions of Python and of the packages that this package requires."""
    names = ("torch", "torch_xla", "jax", "libtpu", "transformers", "datasets")
    there = [f"{name} {version}" for name, version in installed_versions(names).items()]
    yield Finding("python", OK, f"{platform.python_version()}; {', '.join(there)}")
    extras = EXTRAS[TORCHTPU if installed_version(TORCHTPU) else XLA]
    try:
        wrong = misfits(metadata.requires("torchprime") or [], installed_version, extras)
    except metadata.PackageNotFoundError:
        yield Finding("versions", PROBLEM, "torchprime is not installed: pip install -e '.[xla]'")
        return
    extra = "torchtpu" if "torchtpu" in extras else "tpu" if host_has_tpu() else "xla"
    fix = f"pip install 'torchprime[{extra}]'"
    for each in wrong:
        yield Finding("versions", PROBLEM, f"{each}. Install compatible versions: {fix}")
    if not wrong:
        yield Finding("versions", OK, "all versions are compatible")


def host() -> dict[str, object]:
    """Return the versions and devices of this host, for a report of a fault."""
    cuda = range(torch.cuda.device_count()) if torch.cuda.is_available() else range(0)
    return {
        "torchprime": __version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "packages": installed_versions(PACKAGES),
        "devices": {
            "cpu_count": os.cpu_count(),
            "tpu_chips": len(tpu_chips()),
            "cuda": [torch.cuda.get_device_name(i) for i in cuda],
        },
    }


def tpu() -> Iterator[Finding]:
    """Count the TPU chips of this host."""
    chips = tpu_chips()
    if not chips:
        yield Finding("TPU", NONE, "no chips on this host")
    elif host_has_tpu():
        kind = os.environ.get("TPU_ACCELERATOR_TYPE") or os.environ.get("ACCELERATOR_TYPE")
        yield Finding("TPU", OK, f"{len(chips)} chips of this host{f', of {kind}' if kind else ''}")
    else:
        fix = "pip install 'torchprime[tpu]'"
        yield Finding(
            "TPU", PROBLEM, f"{len(chips)} chips, but libtpu, their driver, is missing: {fix}"
        )


def gpu() -> Iterator[Finding]:
    """Count the CUDA devices, and list the optional kernels that are installed."""
    if not torch.cuda.is_available():
        yield Finding("GPU", NONE, "torch sees no CUDA device")
        return
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    kernels = {"flash_attn": "flash-attn", "liger_kernel": "Liger"}
    there = [shown for name, shown in kernels.items() if importlib.util.find_spec(name)]
    detail = f"{len(names)} x {names[0]}; kernels: {', '.join(there) or 'torch only'}"
    yield Finding("GPU", OK, detail)


def virtual_devices() -> Iterator[Finding]:
    """Run XLA on the CPU, partitioned over four virtual devices, in a separate process."""
    if importlib.util.find_spec("torch_xla") is None:
        yield Finding("virtual devices", NONE, "torch_xla is not installed (extra xla)")
        return
    env = {**os.environ, "PJRT_DEVICE": "CPU", "CPU_NUM_DEVICES": "4", "TF_CPP_MIN_LOG_LEVEL": "2"}
    done = subprocess.run(
        [sys.executable, "-c", VIRTUAL], env=env, capture_output=True, text=True, check=False
    )
    if done.returncode == 0:
        yield Finding("virtual devices", OK, "XLA computes on 4 of them")
    else:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        yield Finding("virtual devices", PROBLEM, f"XLA on the CPU does not work: {last}")


def compiler() -> Iterator[Finding]:
    """Compile the quickstart's step with the TPU's compiler."""
    what = "TPU compiler"
    try:
        library = find_library()
    except UserError as error:
        yield Finding(what, PROBLEM if host_has_tpu() else NONE, str(error))
        return
    with tempfile.TemporaryDirectory(prefix="torchprime-doctor-") as folder:
        argv = ["--config-name", "quickstart", "mesh=fsdp4", "remat=scan_full"]
        argv += ["torch_dtype=bfloat16", "compile_only=v5e-4", f"output_dir={folder}"]
        try:
            code = compile_only(compose_config(argv), say=lambda line: None)
        except UserError as error:
            yield Finding(what, PROBLEM, str(error))
            return
    state = OK if code == 0 else PROBLEM
    yield Finding(what, state, f"libtpu {library.version} compiles a small step for v5e-4")


def doctor_main(argv: list[str]) -> int:
    """Print the findings; return 0 if none is a problem, else 1."""
    parser = make_parser("torchprime doctor", __doc__ or "", "")
    parser.add_argument("--quick", action="store_true", help="inspect only; run no test program")
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object and nothing else"
    )
    return run_command(parser, argv, _doctor)


def _doctor(given: argparse.Namespace) -> int:
    checks = [versions, runtime, tpu, gpu] + ([] if given.quick else [virtual_devices, compiler])
    if given.json:
        with contextlib.redirect_stdout(sys.stderr):  # of what a library prints
            found = [finding for check in checks for finding in check()]
            described = host()
        print_json({**described, "checks": [finding._asdict() for finding in found]})
        return int(any(finding.state == PROBLEM for finding in found))
    problems = 0
    for check in checks:
        for finding in check():
            problems += finding.state == PROBLEM
            print_lines([f"{finding.state:<8} {finding.what:<16} {finding.detail}"])
    if problems:
        say(f"{problems} problem{'s' if problems > 1 else ''} found")
    return 1 if problems else 0
