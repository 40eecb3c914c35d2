"""The loss under XLA: its kernel by name, and its distribution over the devices."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch_xla.distributed.spmd as xs
import torch_xla.runtime as xr
from torch import Tensor

from torchprime.errors import ConfigError
from torchprime.losses.chunks import (
    CHUNK_BYTES,
    SMALLEST_CHUNK,
    Spread,
    balanced_chunk,
    tpu_chunk_bytes,
)
from torchprime.sharding import Spec
from torchprime.torch_xla_models.devices import own_chip
from torchprime.torch_xla_models.layers.loops import late_loop
from torchprime.torch_xla_models.layers.runner import behind_barrier
from torchprime.torch_xla_models.mesh import axis_sizes, constrain, local, whole_of

SUPERVISED, CHUNKED = "supervised", "chunked"


def choose_loss(wanted: str, on_tpu: bool) -> tuple[str, str]:
    """Return the loss's name and the reason for it.

    Args:
        wanted: task.loss_kernel.

    Raises:
        ConfigError: it is a kernel of the other backend.
    """
    if wanted == "liger":
        raise ConfigError(
            "task.loss_kernel=liger is a kernel of the GPU backend, and this run is on XLA; use "
            "auto, supervised or chunked."
        )
    why = "auto on TPU" if on_tpu else "auto on CPU"
    if wanted == "auto":
        # docs/log.md, 2026-12-01: the compiler's cycles on a TPU.
        wanted = CHUNKED if on_tpu else SUPERVISED
    else:
        why = "as configured"
    tokens = "all tokens" if wanted == CHUNKED else "the tokens that carry loss"
    return wanted, f"{why}: logits of {tokens}, in chunks"


def loss_spread(mesh: xs.Mesh, batch_axes: Sequence[str], spec: Spec, kernel: str) -> Spread:
    """Return the distribution of the loss over devices, with the chunks that this kind of them
    takes.

    Args:
        batch_axes: along which rows are sharded.
        spec: the sharding of the output weight [V, D].
        kernel: what `choose_loss` returned.
    """
    sizes = axis_sizes(mesh)
    on_tpu, chip = xr.device_type() == "TPU", own_chip()
    vocabulary, hidden = (tuple(axis for axis in dim if axis not in batch_axes) for dim in spec)

    def gather(weight: Tensor) -> Tensor:
        # Times 1, which the compiler removes: a tensor that holds data keeps its own sharding.
        whole = (vocabulary, hidden)
        return constrain(weight * 1, mesh, whole) if weight.dim() == 2 else weight

    def keep(total: Tensor) -> Tensor:
        dims = (vocabulary, hidden) if on_tpu else (hidden, vocabulary)
        return constrain(total, mesh, (tuple(batch_axes), *dims))

    def rows(values: Tensor, index: Tensor) -> Tensor:
        shape = torch.Size((*index.shape, values.shape[2]))
        own = (tuple(batch_axes), (), ())
        # Of one group. Left to itself, the partitioner gathers the rows of all groups everywhere.
        part = local(values, mesh, own)[0].index_select(0, local(index, mesh, own[:2])[0])
        return whole_of(part[None], shape, mesh, own)

    return Spread(
        groups=math.prod(sizes[axis] for axis in batch_axes),
        cut_gradient=lambda gradient: constrain(gradient, mesh, spec),
        in_order=in_order,
        chunk_bytes=tpu_chunk_bytes(chip and chip.hbm_bytes) if on_tpu else CHUNK_BYTES,
        smallest_chunk=balanced_chunk(chip.flops, chip.hbm_bytes_per_s) if chip else SMALLEST_CHUNK,
        gather=gather,
        keep=keep,
        rows=rows,
        loop=late_loop if kernel == SUPERVISED else None,
        vocabulary_first=on_tpu,
    )


def in_order(later: Tensor, earlier: Tensor) -> tuple[Tensor, Tensor]:
    """Return both unchanged, but computations with the later one run after the earlier one."""
    later, earlier = behind_barrier([later, earlier])
    return later, earlier
