"""Bytes that forward and backward pass need besides weights and gradients, counted without data.

Both passes run on tensors without storage, for one and for two layers, while every new tensor's
bytes are added and every freed one's subtracted. The difference of what the two keep is one layer's
share. So the count knows architecture, adapter, remat and loss, without a formula for any of them.
It is that of eager mode: a compiler that fuses operations needs less.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from torchprime.losses.chunks import Projection
from torchprime.losses.cross_entropy import chunked_cross_entropy
from torchprime.models.checkpointing import checkpoint_layers
from torchprime.models.decoder import CausalLM, replace_attention_cores

# Builds the model with this number of layers, without storage.
BuildLayers = Callable[[int], CausalLM]
# A kernel keeps queries, keys, values, output and a number per query; the reference core keeps the
# scores too.
Core = Literal["kernel", "reference"]


class Shape(NamedTuple):
    """The shape of a micro-batch on one device, and the pieces of its loss."""

    rows: int
    block_size: int
    loss_chunks: int | None  # None: as many as the loss makes by itself


class Live(NamedTuple):
    """Bytes besides weights and gradients.

    Attributes:
        kept: at the end of the forward pass, for the backward pass.
        peak: at the fullest moment of both passes: in the loss, or in a layer's backward pass with
            this layer's gradients. Those of finished layers are counted apart.
    """

    kept: int
    peak: int


def live_bytes(
    build: BuildLayers, layers: int, shape: Shape, *, core: Core, names: Sequence[str] | None
) -> Live:
    """Count the bytes of a model with so many layers.

    Args:
        names: the outputs that a layer keeps besides its input; the rest is computed again in its
            backward pass. None: all that autograd wants.
    """
    one, two = (_count(build(number), shape, core, names) for number in (1, 2))
    if layers == 1:
        return one
    # The peak of one layer may lie at the end of the backward pass, where more layers add nothing.
    # Of two it lies in the last layer's, and each layer more adds what it keeps.
    each = two.kept - one.kept
    return Live(two.kept + (layers - 2) * each, two.peak + (layers - 2) * each)


def kept_bytes(
    build: BuildLayers, layers: int, shape: Shape, *, core: Core, names: Sequence[str] | None
) -> int:
    """Count `Live.kept` alone, which needs no backward pass; arguments as in `live_bytes`."""

    def kept(number: int) -> int:
        # What was kept is freed with the hidden states.
        _hidden, counter = _forward(build(number), shape, core, names)
        return counter.now

    one, two = kept(1), kept(2)
    return one + (layers - 1) * (two - one)


def _count(model: CausalLM, shape: Shape, core: Core, names: Sequence[str] | None) -> Live:
    hidden, counter = _forward(model, shape, core, names)
    kept = counter.now
    _drop_gradients_of_finished_layers(model)
    field = torch.zeros(shape.rows, shape.block_size, dtype=torch.int32, device="meta")
    weights = torch.zeros(field.shape, device="meta")
    with counter:
        output = Projection(*model.output)
        loss = chunked_cross_entropy(hidden, output, field, weights, shape.loss_chunks)
        loss.loss_sum.backward()
    return Live(kept, counter.peak)


def _forward(
    model: CausalLM, shape: Shape, core: Core, names: Sequence[str] | None
) -> tuple[Tensor, _Counter]:
    """Return the hidden states, and what counted the bytes to get there."""
    if core == "kernel":
        replace_attention_cores(model, lambda *_: _KernelFootprint())
    model.to("meta")
    if names is not None:
        checkpoint_layers(list(model.model.layers.children()), names)
    field = torch.zeros(shape.rows, shape.block_size, dtype=torch.int32, device="meta")
    with _Counter() as counter:
        hidden = model(field, field, field)
    return hidden, counter


def _drop_gradients_of_finished_layers(model: CausalLM) -> None:
    """Free the gradients of a layer when the first one of another layer is there."""
    now: list[Tensor] = []
    owners: list[str] = [""]

    def hook(owner: str, parameter: Tensor) -> None:
        if owner != owners[0]:
            for each in now:
                each.grad = None
            now.clear()
            owners[0] = owner
        now.append(parameter)

    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            inside = name.removeprefix("model.layers.")
            owner = inside.partition(".")[0] if inside != name else name
            parameter.register_post_accumulate_grad_hook(partial(hook, owner))


class _Counter(TorchDispatchMode):
    """Counts the bytes of the storages that are made and freed inside it."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {storage_of(each) for each in (*args, *(kwargs or {}).values())} - {None}
        out = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, partial(self._see, given), out)
        return out

    def _see(self, given: set[Any], tensor: Tensor) -> None:
        storage: Any = tensor.untyped_storage()
        if storage in self.known or storage in given:
            return
        self.known.add(storage)
        size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, size)

    def _free(self, size: int) -> None:
        self.now -= size


def storage_of(value: object) -> Any:
    """Return a tensor's storage; None for anything else."""
    return value.untyped_storage() if isinstance(value, Tensor) else None


class _KernelFootprint(nn.Module):
    """A core that needs the memory of flash attention (Dao 2023, arXiv:2307.08691)."""

    def prepare(self, segment_ids: Tensor) -> Tensor:
        """Return the segments; a kernel's block masks are small beside activations."""
        return segment_ids

    def forward(self, q: Tensor, k: Tensor, v: Tensor, prepared: Tensor) -> Tensor:
        """Return [B, H, S, h], without values."""
        return _Footprint.apply(q, k, v)  # pyright: ignore[reportReturnType]


@torch.library.custom_op("torchprime::attention_footprint", mutates_args=())
def _results(q: Tensor) -> tuple[Tensor, Tensor]:
    """Return a kernel's output and log-sum-exp. It is an operation of its own for remat."""
    return torch.empty_like(q), q.new_empty(q.shape[:-1], dtype=torch.float32)


_results.register_fake(
    lambda q: (torch.empty_like(q), q.new_empty(q.shape[:-1], dtype=torch.float32))
)


class _Footprint(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, log_sum_exp = _results(q)
        ctx.save_for_backward(q, k, v, out, log_sum_exp)
        return out

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor, ...]:
        q, k, v, _, _ = ctx.saved_tensors
        torch.empty_like(q, dtype=torch.float32)  # where the gradient of q is summed
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
