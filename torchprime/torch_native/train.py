"""The training command on GPUs, and on TPUs by TorchTPU.

    torchrun --standalone --nproc_per_node=N -m torchprime.torch_native.train --config-name NAME

It takes the same configs and overrides as the XLA command and writes the same run folder. One
process per GPU; without GPUs the processes use the CPU and gloo. On TPUs (device=tpu) it starts
torchrun itself on one host, with a process per chip.
"""

from __future__ import annotations

import os
import sys
import warnings

from torchprime.config.entry import run_main
from torchprime.config.schema import AXES, TrainConfig
from torchprime.errors import ConfigError, RuntimeSetupError
from torchprime.installed import installed_version, only_torchtpu, tpu_chips
from torchprime.sweep.command import run_sweep
from torchprime.torch_native.chips.launch import (
    check_alone,
    check_process,
    start_all,
    starts_others,
)
from torchprime.torch_native.tpu.environment import check_environment, on_cpu

ON_CPU = "tpu_on_cpu"


def device_of(config: TrainConfig) -> str:
    """Return the config's device; with `auto`, tpu where there are chips and only TorchTPU."""
    if config.device == "auto" and tpu_chips() and only_torchtpu():
        return "tpu"
    return config.device


def make_backend(config: TrainConfig):
    """Return the backend for a config's device, mesh and kernels.

    Raises:
        RuntimeSetupError: the device is not there.
    """
    device = device_of(config)
    if device in ("tpu", ON_CPU):
        # late: as below
        from torchprime.torch_native.chips.make import make_chips_backend

        return make_chips_backend(config, device)
    # late: it needs torch, and a wrong config is refused without it
    import torch

    # late: as above
    from torchprime.torch_native.backend import NativeBackend
    from torchprime.torch_native.fused_loss import LossRequest

    if device == "cuda" and not torch.cuda.is_available():
        raise RuntimeSetupError(
            "device: given cuda, but torch finds no GPU, expected one. Look at nvidia-smi and "
            "CUDA_VISIBLE_DEVICES, or set device=cpu."
        )
    return NativeBackend(
        {axis: getattr(config.ici_mesh, axis) for axis in AXES},
        {axis: getattr(config.dcn_mesh, axis) for axis in AXES},
        attention_kernel=config.model.attention_kernel,
        loss=LossRequest(
            config.task.loss_kernel, config.task.loss.dft, config.task.loss.label_smoothing > 0
        ),
        remat=config.remat,
        full_precision=config.torch_dtype == "float32",
    )


def prepare_environment(config: TrainConfig) -> None:
    """Set the variables that the device needs, before torch is imported.

    Raises:
        RuntimeSetupError: the device `tpu` is not there, or a variable of its launcher is missing.
        ConfigError: the mesh is not that of the processes.
    """
    os.environ["USE_TORCH_XLA"] = "0"  # transformers would start XLA if it is installed
    device = device_of(config)
    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if device in ("tpu", ON_CPU):
        check_environment()
    if device == ON_CPU:
        check_alone(os.environ)
        os.environ.update(on_cpu(config.device_count, os.environ))
        warnings.filterwarnings("ignore", "<TorchTpu/Performance/TcMalloc/>")
    if device == "tpu":
        check_process(config.device_count, len(tpu_chips()), os.environ)


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
    prepare_environment(config)
    if device_of(config) == "tpu" and starts_others(config.device_count, os.environ):
        return start_all(config.device_count, sys.argv)
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
