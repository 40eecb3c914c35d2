"""The training command on PyTorch/XLA: `python3 torchprime/torch_xla_models/train.py --config-name
NAME`.

The same command runs on a TPU VM, on every host of a slice, and on a machine without a TPU, where
XLA runs on the CPU with as many virtual devices as the mesh has.
"""

from __future__ import annotations

import sys
from typing import Any

from torchprime.config.entry import run_main
from torchprime.config.schema import AXES, TrainConfig
from torchprime.sweep.command import run_sweep
from torchprime.torch_xla_models.runtime import prepare_environment


def make_backend(config: TrainConfig, **more: Any):
    """Return the XLA backend for a config's mesh and kernels.

    Args:
        more: further arguments of the backend.
    """
    # late: importing torch_xla fixes the device and the number of virtual devices
    from torchprime.torch_xla_models.backend import Kernels, XlaBackend

    kernels = Kernels(
        config.model.attention_kernel, config.task.loss_kernel, config.dataset.block_size
    )
    return XlaBackend(
        {axis: getattr(config.ici_mesh, axis) for axis in AXES},
        {axis: getattr(config.dcn_mesh, axis) for axis in AXES},
        kernels=kernels,
        remat=config.remat,
        full_precision=config.torch_dtype == "float32",
        compile_cache=None if config.compile_only or config.dry_run else config.compile_cache,
        **more,
    )


def main(config: TrainConfig) -> int:
    """Train as configured, or with compile_only compile the step; return the exit code."""
    if config.compile_only is not None:
        # late: it takes seconds, and training does not need it
        from torchprime.torch_xla_models.compile.command import compile_only

        return compile_only(config)
    prepare_environment(config.device_count, async_collectives=config.async_collectives)
    # late: transformers looks for torch_xla when imported, and imports it
    from torchprime.metrics.goodput import Ledger, seconds_since_process_start
    from torchprime.training.sft import SFTTrainer
    from torchprime.training.trainer import Trainer

    trainer = SFTTrainer if config.task.name == "sft" else Trainer
    trainer(config, make_backend, ledger=Ledger(seconds_since_process_start())).run()
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main, sweep=run_sweep))
