"""`compile_only` of torch_xla's step: the process that compiles it, and the flags of a run.

The worker (worker.py) reads its environment when torch_xla and jax are imported: the number of
virtual devices is fixed in one process.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import partial

from torchprime.compiling.command import (
    Compiler,
    Say,
    common_environment,
    compile_step,
    import_path,
)
from torchprime.compiling.other_compiler import known_flags
from torchprime.config.schema import TrainConfig
from torchprime.config.topologies import topology
from torchprime.torch_xla_models.compile.library import Library, check_chip, find_library
from torchprime.torch_xla_models.runtime import (
    TORCH_XLA_FLAGS,
    TORCH_XLA_V5_FLAGS,
    tpu_flags,
    with_flags,
)

# Autograd counts an XLA client's devices in a signed byte, and fails from 128 on.
MOST_DEVICES = 64


def compile_only(config: TrainConfig, say: Say | None = None) -> int:
    """Compile the config's step for the slice it names, and print the result.

    Returns:
        The exit code: 0 if it compiles and fits, else 1.

    Raises:
        ConfigError: the compiler does not know the slice's chip.
        CheckpointError: the folder of `adapter.pretrained` holds no adapter of this model.
    """
    assert config.compile_only is not None
    check_chip(topology(config.compile_only))
    return compile_step(config, compiler_of(find_library()), say)


def compiler_of(library: Library) -> Compiler:
    """Return torch_xla's way to the compiler."""
    return Compiler(
        runtime="torch_xla",
        libtpu=library.version,
        worker="torchprime.torch_xla_models.compile.worker",
        environment=partial(environment, library=library, given=os.environ),
        other_environment=partial(other_environment, given=os.environ),
        spmd=True,
    )


def environment(config: TrainConfig, library: Library, given: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of the compiling process: virtual devices for tracing, libtpu for
    compiling, and training's flags."""
    return {
        **common_environment(given, _flags(config, given)),
        "PYTHONPATH": import_path(given, *library.python_path),
        "PJRT_DEVICE": "CPU",
        "CPU_NUM_DEVICES": str(min(config.device_count, MOST_DEVICES)),
        "USE_TORCH_XLA": "0",
        "TPU_LIBRARY_PATH": str(library.path),
    }


def other_environment(config: TrainConfig, given: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of another version's process, without flags that it does not know."""
    return common_environment(given, known_flags(_flags(config, given)))


def _flags(config: TrainConfig, given: Mapping[str, str]) -> str:
    assert config.compile_only is not None
    chip = topology(config.compile_only).chip
    flags = tpu_flags(config.async_collectives) | TORCH_XLA_FLAGS
    flags |= TORCH_XLA_V5_FLAGS if chip.name.startswith("v5") else {}
    return with_flags(given.get("LIBTPU_INIT_ARGS", ""), flags)
