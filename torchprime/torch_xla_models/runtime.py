"""Settings that must be made before torch_xla is imported: the devices, and their number.

A TPU VM announces its chips itself and nothing changes here. Elsewhere XLA runs on the CPU, with as
many virtual devices as the mesh needs; the partitioner is the same, so sharding is real.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from torchprime.errors import RuntimeSetupError
from torchprime.installed import tpu_chips
from torchprime.text.terminal import say

# LLVM unrolls every loop over a stack's layers whole, optimizer updates above all, so that compile
# time would grow with depth although the program does not: 3.1 s at 6 layers and 4.7 s at 24,
# 2.0 and 1.8 s with a low threshold, at the same speed of the step.
CPU_CODE_OPTIONS = "--xla_backend_extra_options=-unroll-threshold=100"

# glibc's options of memory, by the variable with which a user sets one: (number, value).
MALLOC_OPTIONS = {
    "MALLOC_TRIM_THRESHOLD_": (-1, -1),  # never given back
    "MALLOC_MMAP_MAX_": (-4, 0),  # large blocks from the heap too
    "MALLOC_ARENA_MAX": (-8, 1),
}

# Flags for libtpu unless LIBTPU_INIT_ARGS sets them. docs/tpu.md has the numbers.
TPU_FLAGS: dict[str, str] = {
    # Left at its default, products under FSDP become loops that pass weights from chip to chip by
    # collective permutes: for the 8B run three times the traffic of gathering, and no less memory.
    "xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000",
    # One operation for an all-reduced weight gradient and the slice after it, half the traffic,
    # even if a chip's shard is not a multiple of 512 wide: 26 of Qwen3 14B's 27.5 GiB, none
    # without.
    "xla_tpu_use_minor_sharding_for_major_trivial_input": "true",
    "xla_tpu_relayout_group_size_threshold_for_reduce_scatter": "1",
    "xla_tpu_assign_all_reduce_scatter_layout": "true",
}
# On by default in libtpu 0.0.21. Newer versions leave it out on v6e, and warn of hangs and wrong
# results there.
ASYNC_COLLECTIVES_FLAG = "xla_tpu_enable_async_collective_fusion"
# Flags that torch_xla 2.9 sets by itself if it finds a chip, so that a compile without one has them
# too.
TORCH_XLA_FLAGS: dict[str, str] = {
    "xla_tpu_use_enhanced_launch_barrier": "false",
    "xla_latency_hiding_scheduler_rerun": "1",
    "xla_tpu_prefer_async_allgather_to_allreduce": "true",
    "xla_tpu_enable_flash_attention": "false",
}
TORCH_XLA_V5_FLAGS: dict[str, str] = {
    "xla_enable_async_all_gather": "true",
    "xla_enable_async_collective_permute": "true",
}


def tpu_flags(async_collectives: bool) -> dict[str, str]:
    """Return the flags that a run gives to libtpu.

    Args:
        async_collectives: overlap collectives with computation.
    """
    return TPU_FLAGS | ({} if async_collectives else {ASYNC_COLLECTIVES_FLAG: "false"})


def with_flags(given: str, flags: Mapping[str, str]) -> str:
    """Return LIBTPU_INIT_ARGS with the given flags added if they are not in it."""
    named = {part.removeprefix("--").split("=")[0] for part in given.split()}
    added = [f"--{name}={value}" for name, value in flags.items() if name not in named]
    return " ".join([*given.split(), *added])


def host_has_tpu() -> bool:
    """Return True on a TPU VM: there are chips, and libtpu is importable."""
    return bool(tpu_chips()) and importlib.util.find_spec("libtpu") is not None


def prepare_environment(device_count: int, *, async_collectives: bool = True) -> None:
    """Set PJRT_DEVICE, CPU_NUM_DEVICES, XLA_FLAGS and LIBTPU_INIT_ARGS where the user did not,
    raise PJRT_NPROC to a safe value, and print the device.

    Args:
        device_count: product of the mesh's axes.
        async_collectives: as the config says; for a TPU only.

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
    if chosen in (None, "TPU") and host_has_tpu():
        given = os.environ.get("LIBTPU_INIT_ARGS", "")
        os.environ["LIBTPU_INIT_ARGS"] = with_flags(given, tpu_flags(async_collectives))
    elif chosen is None:
        os.environ["PJRT_DEVICE"] = chosen = "CPU"
        noun = "device" if device_count == 1 else "devices"
        say(
            f"No TPU on this host: running XLA on the CPU with {device_count} virtual {noun} "
            "(set PJRT_DEVICE to choose)."
        )
    if chosen == "CPU":
        os.environ.setdefault("CPU_NUM_DEVICES", str(device_count))
        devices = int(os.environ["CPU_NUM_DEVICES"])
        needed = _threads(devices)
        os.environ["PJRT_NPROC"] = str(max(needed, int(os.environ.get("PJRT_NPROC") or 0)))
        _share_cores()
        if devices == 1:
            _keep_freed_memory()
        flags = os.environ.get("XLA_FLAGS", "")
        if "--xla_backend_extra_options" not in flags:
            os.environ["XLA_FLAGS"] = f"{flags} {CPU_CODE_OPTIONS}".strip()


def _threads(devices: int) -> int:
    """Return the number of threads that XLA's CPU client needs: one per core, and more than its
    devices.

    Each virtual device keeps one busy while its program runs. With no thread to spare, the pool's
    queue fills up in a long program, and a task then runs inside the one that submits it. Wide
    products are then silently wrong: their blocks are packed in memory that belongs to a thread,
    and are written over (torch_xla 2.9, `test_long_loops.py`).
    """
    return max(len(os.sched_getaffinity(0)), devices + 1)


def _share_cores() -> None:
    """Keep XLA's threads, which inherit this, from preempting one another when they wake up.

    There is one thread more than cores (`_threads`), and each small task wakes one: it would take a
    core from a thread in the middle of its work, which then continues elsewhere with cold caches.
    """
    if sys.platform == "linux" and os.sched_getscheduler(0) == os.SCHED_OTHER:
        with suppress(OSError):  # a sandbox may forbid it; then it is only slower
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


def _keep_freed_memory() -> None:
    """Let the C library keep what XLA frees after each step, in one heap. Else the kernel takes the
    pages back, and clears and maps them again in the next step, one fault for each. Several devices
    would wait for one another at the one heap."""
    if sys.platform != "linux" or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
    if mallopt is None:
        return
    for variable, (option, value) in MALLOC_OPTIONS.items():
        if variable not in os.environ:
            mallopt(option, value)


def cache_folder(wanted: str | None) -> Path | None:
    """Return this process's folder of compiled programs. Each host has its own, since hosts compile
    the same at the same time and torch_xla's files are not safe for that."""
    if wanted is None:
        return None
    if wanted == "auto":
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        return base / "torchprime" / "compiled"
    return Path(wanted).expanduser() / f"host-{os.environ.get('TPU_WORKER_ID', '0')}"


def check_loop_requirements() -> None:
    """Raise an error if jax is missing: torch_xla's loops would crash without it."""
    if importlib.util.find_spec("jax") is None:
        raise RuntimeSetupError(
            "torch_xla's loops on the device (scan, accumulation) need jax, which is not "
            "installed; torch_xla 2.9.0 goes with: pip install jax==0.7.1 jaxlib==0.7.1"
        )
