"""The backend of a config for the devices `tpu` and `tpu_on_cpu`."""

from __future__ import annotations

from torchprime.attention_kernels.choice import Runtime, choose_kernel
from torchprime.config.checks import refuse
from torchprime.config.schema import TrainConfig
from torchprime.text.terminal import is_first_process, say
from torchprime.torch_native.chips.backend import ChipsBackend
from torchprime.torch_native.chips.client import Chips
from torchprime.torch_native.chips.launch import chip_order, join_group
from torchprime.torch_native.chips.tpu_client import TpuClient
from torchprime.torch_native.processes import make_processes
from torchprime.torch_native.tpu.environment import check_environment
from torchprime.torch_native.tpu.grid import Grid
from torchprime.torch_native.tpu.torchtpu import torch_tpu
from torchprime.training.processes import OneProcess

ON_CPU = "tpu_on_cpu"


def make_chips_backend(config: TrainConfig, device: str) -> ChipsBackend:
    """Return the backend that runs one program per chip.

    Args:
        device: tpu, or tpu_on_cpu.

    Raises:
        ConfigError: a key that this backend cannot follow.
        RuntimeSetupError: TorchTPU is missing, or in another version.
    """
    check_environment()
    check_config(config, device)
    shape = config.mesh_shape()
    sizes = shape["data"], shape["fsdp"], shape["tensor"]
    chips = _on_cpu(Grid(*sizes)) if device == ON_CPU else _on_tpu(sizes)
    wanted = config.model.attention_kernel
    # On the CPU the kernels are interpreted, which is slow: only a config's own wish takes them.
    kind = "CPU" if device == ON_CPU and wanted == "auto" else "TPU"
    runtime = Runtime("TorchTPU", kind, calls_jax=False)
    return ChipsBackend(
        chips,
        remat=remat_of(config),
        attention=choose_kernel(wanted, config.dataset.block_size, runtime),
        loss=("chunked", f"auto on {device}"),
    )


def _on_cpu(grid: Grid) -> Chips:
    # late: jax fixes its devices when it is imported
    from torchprime.torch_native.chips.cpu_client import CpuClient

    return Chips(CpuClient(grid.count), OneProcess(), grid)


def _on_tpu(sizes: tuple[int, int, int]) -> Chips:
    """Join the processes of all chips, with the grid in the order of their topology."""
    torch_tpu()
    join_group()
    order = tuple(chip_order(sizes))
    processes = make_processes()
    grid = Grid(*sizes, order)
    client = TpuClient(order.index(processes.index), grid.count)
    return Chips(client, processes, grid)


def check_config(config: TrainConfig, device: str) -> None:
    """Check the keys that this backend cannot follow.

    Raises:
        ConfigError: there is one.
    """
    if config.task.loss_kernel == "liger":
        refuse(
            "task.loss_kernel",
            "liger",
            f"auto or chunked with device={device}: Liger runs on CUDA only",
            "Set task.loss_kernel=auto.",
        )


def remat_of(config: TrainConfig) -> bool:
    """Return True if layers run again in the backward. A policy that keeps or moves more than a
    layer's input only saves time or memory; it is printed that the program ignores it."""
    remat = config.remat
    full = not remat.kept_outputs and not remat.offloaded
    if remat.selects and not full and is_first_process():
        say(f"note: remat.policy={remat.policy}: one program per chip recomputes whole layers")
    return remat.selects
