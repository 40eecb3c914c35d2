"""What must be decided before torch_xla is imported: which devices, and how many.

A TPU VM announces its chips itself and nothing changes here. Elsewhere XLA runs on the CPU, with as
many virtual devices as the mesh wants; the partitioner is the same, so sharding is real.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from glob import glob

from torchprime.errors import RuntimeSetupError

# LLVM unrolls every loop over a stack's layers whole, optimizer updates above all, so that compile
# time would grow with depth although the program does not: 3.1 s at 6 layers and 4.7 s at 24,
# 2.0 and 1.8 s with a low threshold, at the same speed of the step.
CPU_CODE_OPTIONS = "--xla_backend_extra_options=-unroll-threshold=100"


def host_has_tpu() -> bool:
    """True on a TPU VM: the chips show as VFIO or accel devices, and libtpu is importable."""
    chips = glob("/dev/accel*") + glob("/dev/vfio/[0-9]*")
    return bool(chips) and importlib.util.find_spec("libtpu") is not None


def prepare_environment(device_count: int) -> None:
    """Set PJRT_DEVICE, CPU_NUM_DEVICES and XLA_FLAGS where the user did not, and say which device.

    Args:
        device_count: product of the mesh's axes.

    Raises:
        RuntimeSetupError: torch_xla is not installed or was imported too early.
    """
    if importlib.util.find_spec("torch_xla") is None:
        raise RuntimeSetupError(
            "torch_xla is not installed; this entry trains with PyTorch/XLA. "
            "Install it with: pip install 'torchprime[xla]' (or [tpu] on a TPU VM)."
        )
    # XLA warns once per compilation that its partitioner will be replaced some day.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    chosen = os.environ.get("PJRT_DEVICE")
    if chosen is None and not host_has_tpu():
        os.environ["PJRT_DEVICE"] = chosen = "CPU"
        noun = "device" if device_count == 1 else "devices"
        print(
            f"No TPU on this host: running XLA on the CPU with {device_count} virtual {noun} "
            "(set PJRT_DEVICE to choose).",
            file=sys.stderr,
        )
    if chosen == "CPU":
        os.environ.setdefault("CPU_NUM_DEVICES", str(device_count))
        flags = os.environ.get("XLA_FLAGS", "")
        if "--xla_backend_extra_options" not in flags:
            os.environ["XLA_FLAGS"] = f"{flags} {CPU_CODE_OPTIONS}".strip()


def check_loop_requirements() -> None:
    """torch_xla's loops crash without jax instead of raising; look first."""
    if importlib.util.find_spec("jax") is None:
        raise RuntimeSetupError(
            "torch_xla's loops on the device (scan, accumulation) need jax, which is not "
            "installed; torch_xla 2.9.0 goes with: pip install jax==0.7.1 jaxlib==0.7.1"
        )
