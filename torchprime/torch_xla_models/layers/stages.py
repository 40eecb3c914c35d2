"""The sum of a weight's gradient over all chips of a square slice, in two stages.

On 4 x 4 chips and other squares libtpu makes one all-reduce over all chips of a weight gradient
under FSDP, and slices the result. It knows no reduce-scatter over a plane. Along a row or a column
it does. So the sum is cut in two here: over the chips of a column, after which each chip keeps a
part, then over those of a row.

Only annotations are made here. The partitioner finds the two reduce-scatters from them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch_xla.distributed.spmd as xs
from torch import Tensor, nn

from torchprime.sharding import ShardingTable, Spec
from torchprime.torch_xla_models.linear import WeightGradient, weight_gradient
from torchprime.torch_xla_models.mesh import annotate, axis_sizes, device_places

# Of fewer elements, one all-reduce is as good: it waits for links rather than for bytes.
SMALLEST = 2**20

_COLUMN, _ROW = "column", "row"  # the axes: chips of a column, chips of a row


class Stages(NamedTuple):
    """A square of chips as a mesh of two axes, and the dim of a weight that is cut over all."""

    mesh: xs.Mesh
    side: int
    cut: int

    def gradient(self, x_TN: Tensor, grad_TM: Tensor) -> Tensor:
        """Return the gradient [M, N] of a linear layer's weight.

        Args:
            x_TN: the layer's input of all tokens, cut over all chips.
            grad_TM: the gradient of its output.
        """
        if len(x_TN) % self.side**2:
            return weight_gradient(x_TN, grad_TM)
        x, grad = self._by_chip(x_TN), self._by_chip(grad_TM)
        sums = torch.einsum("crtm,crtn->rmn", grad, x)  # over a column: one for each place in a row
        side, shape = self.side, sums.shape[1:]
        before, size, after = shape[: self.cut], shape[self.cut], shape[self.cut + 1 :]
        # What a chip keeps of each stage is a dim of its own, so that the partitioner slices what
        # it has summed.
        sums = self._annotated(
            sums.reshape(side, *before, side, size // side, *after),
            [_ROW, *_none(before), _COLUMN, None, *_none(after)],
        )
        total = self._annotated(
            sums.reshape(side, *before, side, side, size // side**2, *after).sum(0),
            [*_none(before), _COLUMN, _ROW, None, *_none(after)],
        )
        return total.reshape(shape)

    def _by_chip(self, tensor: Tensor) -> Tensor:
        """Return values of tokens [T, ...] as [side, side, tokens of a chip, ...]."""
        split = tensor.reshape(self.side, self.side, -1, tensor.shape[-1])
        return self._annotated(split, [_COLUMN, _ROW, None, None])

    def _annotated(self, tensor: Tensor, spec: Sequence[str | None]) -> Tensor:
        copy = tensor.clone()  # an annotation works in place
        annotate(copy, self.mesh, tuple(spec))
        return copy


def _none(dims: Sequence[int]) -> list[None]:
    return [None for _ in dims]


def gradient_of(
    mesh: xs.Mesh, table: ShardingTable, layer: str, module: nn.Linear
) -> WeightGradient:
    """Return the computation of a linear layer's weight gradient.

    Args:
        layer: its name in the model.
    """
    spec = table.find(table.parameters, f"model.{layer}.weight")
    stages = stages_for(mesh, spec, module.weight.shape)
    return weight_gradient if stages is None else stages.gradient


def stages_for(mesh: xs.Mesh, spec: Spec | None, shape: Sequence[int]) -> Stages | None:
    """Return the stages for a linear layer's weight; None where one sum is as good.

    Args:
        spec: the weight's sharding.
    """
    sizes = axis_sizes(mesh)
    count = math.prod(sizes.values())
    side = math.isqrt(count)
    if spec is None or math.prod(shape) < SMALLEST or side < 4 or sizes["fsdp"] != count:
        return None
    square = [[number % side, number // side] for number in range(count)]
    if [place[:2] for place in device_places()] != square:
        return None
    cut = [dim for dim, axes in enumerate(spec) if "fsdp" in axes]
    if len(cut) != 1 or shape[cut[0]] % count:
        return None
    return Stages(xs.Mesh(mesh.device_ids, (side, side), (_COLUMN, _ROW)), side, cut[0])
