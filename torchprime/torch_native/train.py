"""The training command on GPUs.

    torchrun --standalone --nproc_per_node=N -m torchprime.torch_native.train --config-name NAME

It takes the same configs and overrides as the XLA command and writes the same run folder. One
process per GPU; without GPUs the processes use the CPU and gloo.
"""

from __future__ import annotations

import os
import sys

from torchprime.config.entry import run_main
from torchprime.config.schema import AXES, TrainConfig
from torchprime.errors import ConfigError
from torchprime.installed import installed_version
from torchprime.sweep.command import run_sweep


def make_backend(config: TrainConfig):
    """Return the native backend for a config's mesh and kernels."""
    # late: it needs torch, and a wrong config is refused without it
    from torchprime.torch_native.backend import NativeBackend
    from torchprime.torch_native.fused_loss import LossRequest

    return NativeBackend(
        {axis: getattr(config.ici_mesh, axis) for axis in AXES},
        {axis: getattr(config.dcn_mesh, axis) for axis in AXES},
        attention_kernel=config.model.attention_kernel,
        loss=LossRequest(config.task.loss_kernel, config.task.loss.dft),
        remat=config.remat,
        full_precision=config.torch_dtype == "float32",
    )


def _compile_only(config: TrainConfig) -> int:
    """Compile the step of one program in TorchTPU's environment; return the exit code."""
    if installed_version("torch-tpu") is None:
        raise ConfigError(
            f"compile_only: given {config.compile_only!r}, expected null: this is the GPU backend. "
            "The TPU's compiler belongs to the other one: torchprime train --backend xla, without "
            "torchrun. To compile TorchTPU's step, use its environment: make setup-torchtpu."
        )
    # late: it takes seconds, and training does not need it
    from torchprime.torch_native.compile.command import compile_only

    return compile_only(config)


def main(config: TrainConfig) -> int:
    """Train as configured and return the exit code."""
    if config.compile_only is not None:
        return _compile_only(config)
    os.environ["USE_TORCH_XLA"] = "0"  # transformers would start XLA if it is installed
    # late: transformers looks for torch_xla when imported
    from torchprime.metrics.goodput import Ledger, seconds_since_process_start
    from torchprime.torch_native.runtime import group
    from torchprime.training.sft import SFTTrainer
    from torchprime.training.trainer import Trainer

    trainer = SFTTrainer if config.task.name == "sft" else Trainer
    with group():
        trainer(config, make_backend, ledger=Ledger(seconds_since_process_start())).run()
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main, sweep=run_sweep))
