"""Creation of the backend's tensors on the mesh, replaceable for compiling without a TPU.

Weights, optimizer state, scalars and batches are all made here, and a traced step is executed here.
`compile/tracing.Placeholders` has the same methods and makes tensors without storage, so that the
step that is compiled without a TPU is the step that trains.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch_xla
import torch_xla.distributed.spmd as xs
from torch import Tensor

from torchprime.sharding import Spec
from torchprime.torch_xla_models.mesh import constrain, execute, send_batch, to_device


class DeviceTensors:
    """Tensors that hold data, each sharded by its spec over the mesh."""

    hold_data = True

    def __init__(self, mesh: xs.Mesh) -> None:
        self.mesh = mesh

    def send(self, host: Tensor, spec: Spec) -> Tensor:
        """Return a host tensor's shards."""
        return to_device(host, self.mesh, spec)

    def send_batch(self, host: Sequence[Tensor], spec: Spec) -> list[Tensor]:
        """Return a batch's fields as shards, without waiting."""
        return send_batch(host, self.mesh, spec)

    def zeros(self, shape: Sequence[int], spec: Spec, dtype: torch.dtype) -> Tensor:
        """Return zeros, made on the devices."""
        zeros = torch.zeros(tuple(shape), dtype=dtype, device=torch_xla.device())
        return constrain(zeros, self.mesh, spec)

    def widened(self, weight: Tensor, spec: Spec) -> Tensor:
        """Return an fp32 copy of a weight, made on the devices."""
        return constrain(weight.detach().float(), self.mesh, spec)

    def materialize(self, state: Sequence[Tensor]) -> None:
        """Execute the pending operations of these tensors, so that they are not part of the next
        program.

        Args:
            state: the tensors that every step writes.
        """
        execute(state)

    def run(self, outputs: Sequence[Tensor]) -> None:
        """Execute the traced program of these tensors."""
        execute(outputs)
