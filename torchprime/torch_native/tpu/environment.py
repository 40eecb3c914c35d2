"""The environment that TorchTPU needs: packages, and variables set before torch starts.

Nothing here imports torch: TorchTPU is loaded with it, and reads the variables then.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torchprime.errors import RuntimeSetupError
from torchprime.installed import installed_version

# The releases whose internals this module knows, and the torch that they are tested with.
SUPPORTED = {"torch-tpu": "0.2", "torch": "2.13"}
OTHER = "torch_xla"
VIRTUAL_DEVICES = "--xla_force_host_platform_device_count"
INSTALL = (
    "Make an environment for TorchTPU alone: make setup-torchtpu, or pip install "
    "'torchprime[torchtpu]'"
)


def check_environment(installed: Callable[[str], str | None] = installed_version) -> None:
    """Check that TorchTPU is installed, in a version that this module knows, without torch_xla.

    Raises:
        RuntimeSetupError: it isn't.
    """
    for name, release in SUPPORTED.items():
        found = installed(name)
        if found is None or not f"{found}.".startswith(f"{release}."):
            given = "it is not installed" if found is None else f"given {found}"
            raise RuntimeSetupError(f"{name}: {given}, expected {release}.x. {INSTALL}.")
    if (found := installed(OTHER)) is not None:
        raise RuntimeSetupError(
            f"{OTHER}: given {found} beside torch-tpu, expected one of them: both bring a TPU "
            f"runtime and need different versions of torch. {INSTALL}."
        )


def without_chip(kind: str = "v6e-8") -> dict[str, str]:
    """Return the variables with which TorchTPU's modules load on a host without a TPU.

    They have to be set before torch is imported, which loads TorchTPU.
    """
    return {
        "TPU_SKIP_MDS_QUERY": "1",  # otherwise minutes of questions to a metadata server
        "TPU_ACCELERATOR_TYPE": kind,
        "TPU_WORKER_ID": "0",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "JAX_PLATFORMS": "cpu",
        "TORCH_CPP_LOG_LEVEL": "ERROR",  # otherwise a warning for each placeholder
    }


def on_cpu(count: int, given: Mapping[str, str]) -> dict[str, str]:
    """Return the variables with which XLA's CPU client stands in for chips.

    Args:
        count: of the chips, as virtual devices.
        given: this process's variables; flags of XLA stay, and a number of devices among them.
    """
    flags = given.get("XLA_FLAGS", "")
    if VIRTUAL_DEVICES not in flags:
        flags = f"{flags} {VIRTUAL_DEVICES}={count}".strip()
    return {**without_chip(), "XLA_FLAGS": flags}
