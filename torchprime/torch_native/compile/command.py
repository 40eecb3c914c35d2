"""`compile_only` in TorchTPU's environment: the process that compiles the step of one program."""

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
from torchprime.config.schema import TrainConfig
from torchprime.config.topologies import topology
from torchprime.installed import installed_version
from torchprime.torch_native.tpu.environment import check_environment, without_chip


def compile_only(config: TrainConfig, say: Say | None = None) -> int:
    """Compile the config's step for the slice it names, and print the result.

    Returns:
        The exit code: 0 if it compiles and fits, else 1.

    Raises:
        RuntimeSetupError: TorchTPU is missing, or in another version.
        ConfigError: the step of one program cannot follow the config.
        CheckpointError: the folder of `adapter.pretrained` holds no adapter of this model.
    """
    check_environment()
    return compile_step(config, torchtpu_compiler(), say)


def torchtpu_compiler() -> Compiler:
    """Return TorchTPU's way to the compiler."""
    return Compiler(
        runtime="torch-tpu",
        libtpu=installed_version("libtpu") or "unknown",
        worker="torchprime.torch_native.compile.worker",
        environment=partial(environment, given=os.environ),
        other_environment=partial(other_environment, given=os.environ),
        spmd=False,
    )


def environment(config: TrainConfig, given: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of the compiling process, where TorchTPU loads without a chip."""
    assert config.compile_only is not None
    return {
        **other_environment(config, given),
        **without_chip(topology(config.compile_only).name),
        "PYTHONPATH": import_path(given),
        "USE_TORCH_XLA": "0",
    }


def other_environment(config: TrainConfig, given: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of another version's process."""
    return common_environment(given, given.get("LIBTPU_INIT_ARGS", ""))
