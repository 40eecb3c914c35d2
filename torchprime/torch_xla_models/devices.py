"""The devices as torch_xla finds them: their kind, their precision, their compiled programs."""

from __future__ import annotations

import logging
import os

import torch_xla.backends
import torch_xla.runtime as xr
from torch_xla import _XLAC as XLAC  # pyright: ignore[reportPrivateImportUsage]
from torch_xla._internal import tpu

from torchprime.config.topologies import Chip, chip_in
from torchprime.errors import ConfigError
from torchprime.files.atomic import make_folder
from torchprime.files.private_folders import require_private
from torchprime.torch_xla_models.runtime import cache_folder


def device_kind() -> str:
    """Return `CPU`, or on a TPU VM the chip's name in the environment or the runtime, such as
    `v6e-8`."""
    kind = xr.device_type() or "unknown"
    if kind != "TPU":
        return kind
    named = os.environ.get("TPU_ACCELERATOR_TYPE") or os.environ.get("ACCELERATOR_TYPE")
    return named or f"TPU v{tpu.version()}"


def own_chip() -> Chip | None:
    """Return the type of the TPU's chips; None on another device, or if its name is not known."""
    return chip_in(device_kind())


def keep_compiled(wanted: str | None) -> None:
    """Turn on the cache of compiled programs on disk, before the first compile. XLA's CPU compiler
    writes programs that it can't read back (torch_xla 2.9), so this is for TPUs only."""
    folder = cache_folder(wanted)
    if folder is None or xr.device_type() != "TPU" or _is_keeping_compiled():
        return
    try:
        make_folder(folder)
    except OSError as error:
        raise ConfigError(
            f"compile_cache: {folder} cannot be made ({error.strerror}). Set compile_cache to a "
            "folder that can be written, or to null."
        ) from error
    require_private(folder, "compile_cache")  # programs from this folder are executed
    xr.initialize_cache(str(folder))


def _is_keeping_compiled() -> bool:
    return XLAC._xla_computation_cache_is_initialized()


def multiply_in_full_precision() -> None:
    """Make a TPU multiply fp32 in full precision; by default it uses one bf16 pass."""
    logger = logging.getLogger("torch_xla.backends")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it warns at every call that a second call may have no effect
    torch_xla.backends.set_mat_mul_precision("highest")
    logger.setLevel(level)
