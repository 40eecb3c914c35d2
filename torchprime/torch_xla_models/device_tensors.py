"""How the backend's tensors come to be on the mesh: the one seam between training and compiling.

Weights, optimizer state, scalars and batches are all made here, and what a step traced is handed
over here. `ahead_of_time.Placeholders` has the same methods and makes tensors without storage, so
that the step which is compiled for a TPU elsewhere is the step that trains.
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
    """Tensors that hold data, each cut by its spec over the mesh."""

    def __init__(self, mesh: xs.Mesh) -> None:
        self.mesh = mesh

    def send(self, host: Tensor, spec: Spec) -> Tensor:
        """Return a host tensor's shards."""
        return to_device(host, self.mesh, spec)

    def send_batch(self, host: Sequence[Tensor], spec: Spec) -> list[Tensor]:
        """Return the same of a batch's fields, without waiting."""
        return send_batch(host, self.mesh, spec)

    def zeros(self, shape: Sequence[int], spec: Spec) -> Tensor:
        """fp32 zeros, made on the devices."""
        zeros = torch.zeros(tuple(shape), dtype=torch.float32, device=torch_xla.device())
        return constrain(zeros, self.mesh, spec)

    def widened(self, weight: Tensor, spec: Spec) -> Tensor:
        """Return an fp32 copy of a weight, made on the devices."""
        return constrain(weight.detach().float(), self.mesh, spec)

    def materialize(self, state: Sequence[Tensor]) -> None:
        """What was made so far holds data from here on, and is no part of the next program.

        Args:
            state: what every step writes.
        """
        execute(state)

    def run(self, outputs: Sequence[Tensor]) -> None:
        """Hand over what was traced for these tensors."""
        execute(outputs)
