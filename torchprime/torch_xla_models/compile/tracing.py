"""Tracing of the training step without weights, and lowering to a compiler's input.

The backend is made with `Placeholders` instead of `DeviceTensors`. Every tensor then has a shape, a
type and a spec, but no storage, and the step is traced by the code that trains. The program that
the backend would have executed is lowered to an HLO module instead, with the sharding of each
argument and a flag if the program may write over it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch_xla.core.xla_builder as xb
import torch_xla.distributed.spmd as xs
from torch import Tensor
from torch_xla import _XLAC as XLAC  # pyright: ignore[reportPrivateImportUsage]

from torchprime.compiling.tracing import StepParts, run_step
from torchprime.sharding import Spec
from torchprime.torch_xla_models.backend import XlaBackend
from torchprime.torch_xla_models.device_tensors import DeviceTensors
from torchprime.torch_xla_models.mesh import annotate, partition


class Argument(NamedTuple):
    """One argument of the program."""

    shape: tuple[int, ...]
    sharding: str  # as HLO writes it
    spec: Spec
    donated: bool  # the step writes its new value over the old one


class Lowered(NamedTuple):
    """A lowered step, the input of a compiler."""

    hlo: bytes  # a serialized HloModuleProto
    arguments: dict[int, Argument]  # by position; constants made on the host are not among them


class Placeholders(DeviceTensors):
    """Tensors without storage. Reading one would end the process, so no code here does."""

    hold_data = False

    def __init__(self, mesh: xs.Mesh) -> None:
        super().__init__(mesh)
        self.lowered: Lowered | None = None
        self._state: list[tuple[Tensor, Spec]] = []
        self._made: dict[int, Argument] = {}  # key: the identity of the storage a tensor would have

    def send(self, host: Tensor, spec: Spec) -> Tensor:
        """Return a tensor for a host tensor's shards; the host tensor may be without storage
        too."""
        return self._make(host.shape, host.dtype, spec)

    def send_batch(self, host: Sequence[Tensor], spec: Spec) -> list[Tensor]:
        """Return tensors for a batch's fields."""
        return [self._make(t.shape, t.dtype, spec) for t in host]

    def zeros(self, shape: Sequence[int], spec: Spec, dtype: torch.dtype) -> Tensor:
        """Return a tensor for zeros."""
        return self._make(shape, dtype, spec)

    def widened(self, weight: Tensor, spec: Spec) -> Tensor:
        """Return a tensor for an fp32 copy of a weight."""
        return self._make(weight.shape, torch.float32, spec)

    def materialize(self, state: Sequence[Tensor]) -> None:
        """Do nothing to materialize tensors, but note which tensors are written."""
        for tensor in state:
            made = self._made[_identity(tensor)]
            self._made[_identity(tensor)] = made._replace(donated=True)
            self._state.append((tensor, made.spec))

    def run(self, outputs: Sequence[Tensor]) -> None:
        """Lower the traced program of these tensors instead of executing it."""
        for tensor, spec in self._state:
            # If a tensor with storage on the mesh is written over, torch_xla annotates the new
            # value with the old one's sharding. A placeholder has no storage.
            annotate(tensor, self.mesh, partition(spec))
        context = XLAC.lowering.LoweringContext("train_step")
        context.build([t.detach() for t in outputs])
        parameters = context.device_parameter_id_tensor_mapping()
        made = {position: self._made.get(_identity(t)) for position, t in parameters.items()}
        arguments = {position: each for position, each in made.items() if each is not None}
        self.lowered = Lowered(context.hlo(), arguments)

    def _make(self, shape: Sequence[int], dtype: torch.dtype, spec: Spec) -> Tensor:
        made = xb.create_placeholder_tensor(tuple(shape), dtype)
        spec = spec or ((),) * len(shape)
        sharding = hlo_sharding(self.mesh, spec)
        self._made[_identity(made)] = Argument(tuple(shape), sharding, spec, donated=False)
        return made


def _identity(tensor: Tensor) -> int:
    return XLAC._unique_id_for_ir_and_data(tensor)


def hlo_sharding(mesh: xs.Mesh, spec: Spec) -> str:
    """Return a table's spec in HLO's notation of a sharding: pieces along each dim, then the
    devices in order."""
    names = list(mesh.axis_names or ())
    sizes = list(mesh.mesh_shape)
    cut = [[names.index(axis) for axis in axes] for axes in spec]
    pieces = [int(np.prod([sizes[axis] for axis in axes], dtype=int)) for axes in cut]
    if all(count == 1 for count in pieces):
        return "{replicated}"
    used = [axis for axes in cut for axis in axes]
    rest = [axis for axis in range(len(names)) if axis not in used]
    devices = np.array(mesh.device_ids).reshape(sizes).transpose(used + rest).flatten()
    copies = len(devices) // int(np.prod(pieces, dtype=int))
    dims = ",".join(map(str, [*pieces, *([copies] if copies > 1 else [])]))
    last = " last_tile_dim_replicate" if copies > 1 else ""
    return f"{{devices=[{dims}]{','.join(map(str, devices))}{last}}}"


def trace_step(backend: XlaBackend, parts: StepParts) -> Lowered:
    """Return the lowered training step of a backend made with `Placeholders`."""
    placeholders = backend.tensors
    assert isinstance(placeholders, Placeholders)
    run_step(backend, parts)
    assert placeholders.lowered is not None
    return placeholders.lowered
