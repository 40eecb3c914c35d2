"""The parameters of a model whose layers gather their weights: names, shapes, parts and types."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from torchprime.adapters.quantized import placed_type
from torchprime.errors import ConfigError
from torchprime.losses.chunks import CHUNK_BYTES, ChunkBytes
from torchprime.models.decoder import CausalLM, put_barriers
from torchprime.sharding import ShardingTable
from torchprime.torch_native.placement import check_adapter
from torchprime.torch_native.tpu.collectives import Gather, all_reduce, barrier, reduce_scatter
from torchprime.torch_native.tpu.grid import Cut, Grid
from torchprime.torch_native.tpu.layers import (
    GatheredLayer,
    GatheredStack,
    TensorCut,
    cut_along_tensor,
    layer_gather,
)
from torchprime.training.optim.optimizer import Parameter
from torchprime.training.step import HeldModel

LAYERS = "model.layers."


@dataclass(frozen=True)
class Held:
    """A parameter as the step holds it; a stack has the parameter of every layer.

    Attributes:
        names: in a checkpoint.
        shape: of the whole; of a stack [layers, ...].
        cut: the part that a chip holds.
    """

    name: str
    names: tuple[str, ...]
    shape: tuple[int, ...]
    cut: Cut
    dtype: torch.dtype
    trained: bool
    stacked: bool

    @property
    def part(self) -> tuple[int, ...]:
        """The shape of a chip's part."""
        return self.cut.part_of(self.shape)

    def info(self) -> Parameter:
        """Return the facts that an optimizer may use; its functions become part of the step."""
        cut = self.cut
        return Parameter(
            self.names,
            self.shape,
            self.dtype,
            self.stacked,
            mean=partial(_mean, self),
            whole=Gather.of(cut),
            own=partial(_own, cut),
        )

    def part_on(self, rank: int, tensor_of: Callable[[str], Tensor]) -> Tensor:
        """Return a chip's part of the values that a function gives for each name."""
        dims = self.cut.dims[1:] if self.stacked else self.cut.dims
        cut = Cut(self.cut.grid, dims)
        parts = [cut.own(tensor_of(name), rank).to(self.dtype) for name in self.names]
        return torch.stack(parts) if self.stacked else parts[0].clone()


def _mean(held: Held, values: Tensor, dims: tuple[int, ...]) -> Tensor:
    total, count = values.sum(dim=dims, keepdim=True), 1
    for dim in (dim % len(held.shape) for dim in dims):
        total, count = all_reduce(total, held.cut.dims[dim]), count * held.shape[dim]
    return total / count


def _own(cut: Cut, values: Tensor) -> Tensor:
    """Return this chip's part of values that all chips have: a sum of equals, divided again. The
    program is the same on all chips, so it can't name its own part."""
    for dim, axes in enumerate(cut.dims):
        values = reduce_scatter(cut.grid, values, dim, axes) / cut.grid.size(axes)
    return values


@dataclass(frozen=True)
class Parts:
    """A model whose layers gather their weights when they run.

    Attributes:
        held: the parameters: those outside of the layers, then those of the layers in the order of
            `GatheredStack.parts`.
        gathers: of those outside.
        chunk_bytes: the most bytes of the logits of one chunk of the loss.
    """

    model: CausalLM
    grid: Grid
    held: list[Held]
    gathers: dict[str, Gather]
    chunk_bytes: ChunkBytes

    @property
    def stack(self) -> GatheredStack:
        """The container of the layers."""
        stack = self.model.model.layers
        assert isinstance(stack, GatheredStack)
        return stack

    @property
    def buffers(self) -> dict[str, Tensor]:
        """The model's constants by name."""
        return dict(self.model.named_buffers())

    def call(
        self,
        parts: Mapping[str, Tensor],
        buffers: Mapping[str, Tensor],
        function: Callable[[], Any],
    ) -> Any:
        """Call a function that runs the model, while the model has these parts of its parameters
        and these constants."""
        self.stack.parts = [parts[e.name] for e in self.held if e.name not in self.gathers]
        whole = {f"model.{name}": gather(parts[name]) for name, gather in self.gathers.items()}
        whole |= {f"model.{name}": buffer for name, buffer in buffers.items()}
        return functional_call(HeldModel(self.model), whole, (function,))


def hold(
    model: CausalLM,
    table: ShardingTable,
    grid: Grid,
    dtype: torch.dtype,
    *,
    remat: bool,
    chunk_bytes: ChunkBytes = CHUNK_BYTES,
) -> Parts:
    """Replace a model's layers, which have no storage, by ones that gather their weights.

    Equal layers become one loop if they are recomputed in the backward.

    Raises:
        ConfigError: a parameter, head or adapter that the grid cannot cut.
    """
    check_tensor_axis(model, grid)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    specs = table.parameter_specs(shapes, {**grid.sizes, "expert": 1, "context": 1})
    cuts = {name: Cut.of(grid, spec) for name, spec in specs.items()}

    def held(name: str, parameter: Tensor) -> Held:
        kind = placed_type(name, parameter, dtype)
        shape, trained = shapes[name], parameter.requires_grad
        return Held(name, (name,), shape, cuts[name], kind, trained, stacked=False)

    every = [held(name, parameter) for name, parameter in model.named_parameters()]
    outer = [each for each in every if not each.name.startswith(LAYERS)]
    inner = [each for each in every if each.name.startswith(LAYERS)]
    layers = list(model.model.layers.children())
    put_barriers(model.model, barrier)
    scan = remat and _equal(layers)
    made = []
    for number, layer in enumerate(layers):
        own = {n: cuts[f"{LAYERS}{number}.{n}"] for n, _ in layer.named_parameters()}
        several = grid.tensor > 1
        tensor = cut_along_tensor(layer, own, model.architecture) if several else TensorCut({})
        gathers = {name: layer_gather(name, cut, tensor) for name, cut in own.items()}
        trained = [p.requires_grad for p in layer.parameters()]
        made.append(GatheredLayer(layer, gathers, trained, tensor))
    model.model.layers = GatheredStack(made, grid, scan=scan, remat=remat)
    gathers = {each.name: Gather.of(each.cut) for each in outer}
    every = [*outer, *(_stacked(inner, len(layers)) if scan else inner)]
    return Parts(model, grid, every, gathers, chunk_bytes)


def _stacked(inner: Sequence[Held], layers: int) -> list[Held]:
    size, found = len(inner) // layers, []
    for number, first in enumerate(inner[:size]):
        names = tuple(each.name for each in inner[number::size])
        name = first.name.replace(f"{LAYERS}0.", f"{LAYERS}*.")
        shape, cut = (layers, *first.shape), first.cut.stacked()
        found.append(Held(name, names, shape, cut, first.dtype, first.trained, stacked=True))
    return found


def _equal(layers: Sequence[nn.Module]) -> bool:
    """Return True if the layers differ in their weights' values only."""
    first = _structure(layers[0])
    return all(_structure(each) == first for each in layers[1:])


def _structure(layer: nn.Module) -> tuple[object, ...]:
    parameters = [(n, tuple(p.shape), p.requires_grad) for n, p in layer.named_parameters()]
    plain: list[tuple[str, str, object]] = []
    for name, module in layer.named_modules():
        for key, value in vars(module).items():
            if isinstance(value, bool | int | float | str | None):
                plain.append((name, key, value))
    return (parameters, plain)


def check_tensor_axis(model: CausalLM, grid: Grid) -> None:
    """Check that heads and adapters can be cut along `tensor`; `cut_along_tensor` checks dropout.

    Raises:
        ConfigError: they can't.
    """
    a, size = model.architecture, grid.tensor
    if size == 1:
        return
    check_adapter(model, size)
    if a.qk_norm_over_heads:
        raise ConfigError(
            f"ici_mesh.tensor: given {size}, expected 1, since this model normalizes queries and "
            "keys over all heads, which are not cut. Use the fsdp axis instead."
        )
    if a.num_attention_heads % size:
        raise ConfigError(
            f"ici_mesh.tensor: given {size}, expected a divisor of the model's "
            f"{a.num_attention_heads} heads (num_attention_heads). Use the fsdp axis instead."
        )
