"""The backend of a command: chosen by the host, or asked for; and started.

`choose_backend` decides without importing torch_xla: importing it takes seconds and fixes the
devices.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

from torchprime.config.schema import TrainConfig
from torchprime.errors import ConfigError
from torchprime.installed import installed_version, only_torchtpu, tpu_chips
from torchprime.text.terminal import is_first_process, say
from torchprime.torch_native import train as native
from torchprime.torch_xla_models import train as xla
from torchprime.torch_xla_models.runtime import host_has_tpu, prepare_environment

FLAG = "--backend"
NAMES = {"xla": "PyTorch/XLA", "native": "torch.distributed"}
TORCHRUN = "torchrun --standalone --nproc_per_node={} -m torchprime.cli.main train"
MakeBackend = Callable[[TrainConfig], Any]


class Choice(NamedTuple):
    """A backend, why it runs, and how to choose otherwise."""

    backend: str
    reason: str
    instead: str = ""


def choose_backend(
    asked: str | None, compile_only: str | None, flag: str = FLAG, device: str = "auto"
) -> Choice:
    """Choose the backend for this host and process.

    Args:
        asked: the backend given by `flag`.
        compile_only: the config's; only the XLA backend compiles for TPUs, or the native one in
            TorchTPU's environment.
        device: the config's, which only the native backend has.

    Raises:
        ConfigError: XLA is asked for in one of several processes that torchrun started, or with a
            device.
    """
    if asked == "xla" and device != "auto":
        raise ConfigError(
            f"device: given {device!r} with {flag} xla, expected auto: PJRT_DEVICE chooses that "
            f"backend's device. Leave device out, or write {flag} native."
        )
    local = os.environ.get("LOCAL_WORLD_SIZE", "1")
    if asked == "xla" and local != "1":
        raise ConfigError(
            f"{flag}: given 'xla' under torchrun with {local} processes on this host, expected "
            "one process: XLA drives all of a host's devices from it. Start without torchrun, or "
            f"write {flag} native."
        )
    if asked is not None:
        return Choice(asked, f"given by {flag}")
    if device != "auto":
        return Choice("native", f"device={device}", f"for the other: device=auto {flag} xla")
    if (size := os.environ.get("WORLD_SIZE")) is not None:
        reason = f"torchrun started this process, one of {size}"
        return Choice("native", reason, "for XLA, start without torchrun")
    if compile_only is not None:
        torchtpu = installed_version("torch-tpu") is not None
        return Choice("native" if torchtpu else "xla", "compile_only asks for the TPU's compiler")
    if (given := os.environ.get("PJRT_DEVICE")) is not None:
        return Choice("xla", f"PJRT_DEVICE is {given}", f"for the other: {FLAG} native")
    if host_has_tpu() and only_torchtpu():
        return Choice("native", f"this host has {len(tpu_chips())} TPU chips, and torch-tpu")
    if host_has_tpu():
        reason = f"this host has {len(tpu_chips())} TPU chips"
        return Choice("xla", reason, f"for the other: {FLAG} native")
    return _without_tpu()


def _without_tpu() -> Choice:
    # late: it takes seconds, which a TPU or torchrun makes unnecessary
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    other = f"for the other: {FLAG} xla"
    if gpus == 1:
        return Choice("native", "this host has a CUDA GPU and no TPU", other)
    if gpus > 1:
        reason = f"this host has {gpus} CUDA GPUs and no TPU; this process uses one"
        return Choice("native", reason, f"for all: {TORCHRUN.format(gpus)} ...; {other}")
    if importlib.util.find_spec("torch_xla") is None:
        reason = "this host has neither TPU nor CUDA GPU, and torch_xla is not installed"
        return Choice("native", reason, "for the other: pip install 'torchprime[xla]'")
    reason = "this host has neither TPU nor CUDA GPU"
    return Choice("xla", reason, f"for the other: {FLAG} native")


def with_backend(config: TrainConfig, chosen: Choice, use: Callable[[MakeBackend], None]) -> None:
    """Prepare this process for a backend, print which one and why, and call `use` with the function
    that makes it."""
    backend, reason, _ = chosen
    if is_first_process():
        say(f"backend {backend} ({NAMES[backend]}): {reason}")
    if backend == "xla":
        prepare_environment(config.device_count, async_collectives=config.async_collectives)
        use(xla.make_backend)
        return
    native.prepare_environment(config)
    # late: it needs torch, and a wrong config is refused without it
    from torchprime.torch_native.runtime import group

    with group():
        use(native.make_backend)


def refuse_sweep(command: str, why: str) -> NoReturn:
    """Refuse a sweep of a command that makes one thing.

    Args:
        why: one thing only, such as `writes one folder (--out DIR)`.
    """
    raise ConfigError(
        f"-m: given with torchprime {command}, which {why}. Start a command for each config."
    )
