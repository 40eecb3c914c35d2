"""The builder of the whole step: gathers, micro-batches, clipping, optimizer, one graph.

    parts of weights and state, a batch's rows, a learning rate -> numbers, new weights and state

It is written with the project's own decoder, losses, optimizers and `finish_step`. The graph has
the tensors of one chip; collectives in it name axes. A backend runs it on chips, a test on a CPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule

from torchprime.adapters.apply import is_adapted, without_adapters
from torchprime.losses.chunks import Projection, Spread
from torchprime.losses.cross_entropy import LossSums, chunked_cross_entropy
from torchprime.losses.divergence import BaseOutput, chunked_divergence
from torchprime.torch_native.tpu.collectives import all_reduce, barrier
from torchprime.torch_native.tpu.grid import BATCH, Grid
from torchprime.torch_native.tpu.layers import BASE
from torchprime.torch_native.tpu.loops import traced, traced_loop
from torchprime.torch_native.tpu.parameters import Held, Parts
from torchprime.training.backend import StepOptions
from torchprime.training.optim.optimizer import Optimizer
from torchprime.training.regularization.near_base import NearBase
from torchprime.training.regularization.penalty import Anchor
from torchprime.training.step import (
    ParameterState,
    StepSums,
    TrainState,
    Update,
    counted_weights,
    drawing,
    draws_of,
    finish_step,
    inputs_of,
    loss_of,
    micro_sums,
    supervised_weight,
)

FISHER = "fisher"  # of inputs' names, as BASE


class Input(NamedTuple):
    """One of the step's inputs. Those of the state are written in place: the chip needs their
    memory once."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    donated: bool

    @property
    def bytes(self) -> int:
        """The input's bytes on a chip."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Training:
    """The choices that shape a step besides model and grid."""

    optimizer: Optimizer
    options: StepOptions


@dataclass(frozen=True)
class Rows:
    """The shape of a chip's rows: [micro-batches, rows, sequence], and each field's type."""

    micro_batches: int
    rows: int
    sequence: int
    dtypes: tuple[torch.dtype, ...]


@dataclass(frozen=True)
class StepGraph:
    """The step of one chip.

    Attributes:
        graph: takes `inputs`; returns the numbers of `finish_step`, then each donated input's new
            value.
        held: the parameters, in the order of the weights among the inputs.
    """

    graph: GraphModule
    inputs: list[Input]
    held: list[Held]
    grid: Grid


def in_order(x: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
    """Return both; a chunk of the loss starts after the sum so far is computed."""
    x, total = barrier([x, total])
    return x, total


def spread_of(parts: Parts) -> Spread:
    """Return the distribution of the loss on a chip."""
    return Spread(in_order=in_order, chunk_bytes=parts.chunk_bytes, vocabulary_first=True)


class StepBuilder:
    """Builds the step of a model whose layers gather their weights."""

    def __init__(self, parts: Parts, training: Training) -> None:
        self.parts, self.training = parts, training
        self.model, self.grid, self.stack = parts.model, parts.grid, parts.stack
        self.held, self.buffers = parts.held, parts.buffers
        self.trained = [each for each in self.held if each.trained]
        self.frozen = [each for each in self.held if not each.trained]
        self.adapted = any(is_adapted(layer) for layer in self.stack.templates())

    def inputs(self, rows: Rows) -> list[Input]:
        """Return the step's inputs in order."""
        scalar = partial(Input, shape=(), dtype=torch.float32)
        found = self.state_inputs()
        found += [Input(f"model.{each.name}", each.part, each.dtype, False) for each in self.frozen]
        for each in self.with_base():
            found.append(Input(f"{BASE}.{each.name}", each.part, each.dtype, False))
        for each in self.with_fisher():
            found.append(Input(f"{FISHER}.{each.name}", each.part, torch.float32, False))
        for name, buffer in self.buffers.items():
            found.append(Input(name, tuple(buffer.shape), buffer.dtype, False))
        found.append(scalar("lr", donated=False))
        shape = (rows.micro_batches, rows.rows, rows.sequence)
        found += [Input(f"field.{n}", shape, kind, False) for n, kind in enumerate(rows.dtypes)]
        return found

    def with_base(self) -> list[Held]:
        """Return the parameters of which the step also reads the base's values."""
        options = self.training.options
        if options.kl is not None and not self.adapted:
            return self.held
        return self.trained if options.penalty is not None else []

    def with_fisher(self) -> list[Held]:
        """Return the parameters of which the step reads the Fisher information."""
        penalty = self.training.options.penalty
        return self.trained if penalty is not None and penalty.has_fisher else []

    def state_inputs(self) -> list[Input]:
        """Return the inputs that the step writes, which come first."""
        o, optimizer = self.training.options, self.training.optimizer
        scalar = partial(Input, shape=(), dtype=torch.float32)
        found = [scalar("step", donated=True), scalar("bad_step", donated=True)]
        if o.spikes is not None:
            found.append(Input("spikes", (o.spikes.length,), torch.float32, True))
        for each in self.trained:
            found.append(Input(f"model.{each.name}", each.part, each.dtype, True))
            for slot, keeps in optimizer.slots(each.info()).items():
                name = f"optimizer.{slot}.{each.name}"
                found.append(Input(name, keeps.kept(each.part), keeps.dtype, True))
            if self.has_master(each):
                found.append(Input(f"master.{each.name}", each.part, torch.float32, True))
        return found

    def has_master(self, each: Held) -> bool:
        """Return True if a parameter has an fp32 copy."""
        return each.dtype != torch.float32 and self.training.options.master_weights

    def build(self, rows: Rows) -> StepGraph:
        """Trace the step for rows of a shape."""
        inputs = self.inputs(rows)
        with FakeTensorMode(allow_non_fake_inputs=True):
            fakes = [torch.empty(each.shape, dtype=each.dtype) for each in inputs]
            self._look(fakes, rows)
        graph = traced(self._whole, fakes)
        return StepGraph(graph, inputs, self.held, self.grid)

    def _look(self, fakes: Sequence[Tensor], rows: Rows) -> None:
        """Trace the loops over layers and micro-batches, for tensors like the step's."""
        given = self._given(fakes)
        stack = self.stack
        fields = [field[0] for field in given.fields]
        weights = [p.weight for p in given.state.parameters.values()]
        with torch.no_grad():
            if self.training.options.kl is not None:
                with self._as_base(), stack.traced_for():
                    self._base_output(given, fields)
            with self._drawing(given, fields), stack.traced_for():
                self._loss(given, weights, fields)
        self.loop = None
        if rows.micro_batches > 1:
            zeros = self._zeros(given)
            fields = [field[0] for field in given.fields]
            constants = self._constants(given)

            def body(*tensors: Tensor) -> list[Tensor]:
                sums, rest = tensors[: len(zeros)], tensors[len(zeros) :]
                again = self._again(given, rest[len(fields) :])
                found, gradients = self._micro(again, list(rest[: len(fields)]))
                new = [found, *(g.float() for g in gradients)]
                return [a + b for a, b in zip(sums, new, strict=True)]

            self.loop = traced_loop(body, zeros, fields, constants)

    def _given(self, tensors: Sequence[Tensor]) -> _Given:
        """Sort the step's inputs."""
        rest = iter(tensors)
        step, bad_step = next(rest), next(rest)
        options, optimizer = self.training.options, self.training.optimizer
        spikes = None if options.spikes is None else next(rest)
        states = {}
        for each in self.trained:
            info = each.info()
            weight = next(rest)
            slots = {slot: next(rest) for slot in optimizer.slots(info)}
            master = next(rest) if self.has_master(each) else None
            states[each.name] = ParameterState(info, weight, slots, master)
        state = TrainState(states, step, bad_step, spikes)
        frozen = [next(rest) for _ in self.frozen]
        base = {each.name: next(rest) for each in self.with_base()}
        fisher = {each.name: next(rest) for each in self.with_fisher()}
        if options.penalty is not None:
            for name, parameter in states.items():
                anchor = Anchor(base[name], fisher.get(name))
                states[name] = parameter._replace(anchor=anchor)
        buffers = [next(rest) for _ in self.buffers]
        return _Given(state, frozen, base, buffers, next(rest), list(rest))

    def _constants(self, given: _Given) -> list[Tensor]:
        """Return what each micro-batch reads: weights, frozen ones, buffers, the step's number."""
        weights = [p.weight for p in given.state.parameters.values()]
        return [
            *weights, *given.frozen, *given.base.values(), *given.buffers, given.state.step
        ]  # fmt: skip

    def _again(self, given: _Given, constants: Sequence[Tensor]) -> _Given:
        """Return the same inputs with those constants, as a loop's body gets them."""
        rest = iter(constants)
        states = {name: p._replace(weight=next(rest)) for name, p in given.state.parameters.items()}
        frozen = [next(rest) for _ in given.frozen]
        base = {name: next(rest) for name in given.base}
        buffers = [next(rest) for _ in given.buffers]
        state = TrainState(states, next(rest), given.state.bad_step, None)
        return _Given(state, frozen, base, buffers, given.lr, [])

    def _whole(self, *tensors: Tensor) -> list[Tensor]:
        """Compute the step on this chip's tensors; results are new tensors."""
        given = self._given([each.clone() for each in tensors])
        with torch.no_grad():
            if self.loop is None:
                fields = [field[0] for field in given.fields]
                losses, gradients = self._micro(given, fields)
            else:
                (losses, *gradients), _ = self.loop(
                    self._zeros(given), given.fields, self._constants(given)
                )
            supervised = supervised_weight(given.fields)
            over = self.grid.several(BATCH)
            totals = all_reduce(torch.cat([losses, supervised[None]]), over)
            numbers = finish_step(
                Update(given.state, self.training.optimizer, self.training.options),
                StepSums(totals[:-1], totals[-1], gradients),
                given.lr,
                over_shards=self._over_shards,
            )
        return [numbers, *given.state.tensors()]

    def _zeros(self, given: _Given) -> list[Tensor]:
        """Return the sums of micro-batches before the first one."""
        options = self.training.options
        sources = options.num_sources if options.num_sources > 1 else 0
        step = given.state.step
        sums = step.new_zeros(1 + len(options.loss_terms) + sources)
        weights = (p.weight for p in given.state.parameters.values())
        return [sums, *(torch.zeros(w.shape, dtype=torch.float32) for w in weights)]

    def _micro(self, given: _Given, fields: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Return a micro-batch's sums, and its gradients by each trained part."""
        near = self._near_base(given, fields)
        with torch.enable_grad(), self._drawing(given, fields):
            weights = (p.weight for p in given.state.parameters.values())
            leaves = [weight.detach().requires_grad_() for weight in weights]
            loss = self._loss(given, leaves, fields, near)
            gradients = list(torch.autograd.grad(loss.loss_sum, leaves))
        return micro_sums(loss, fields, self.training.options.num_sources), gradients

    def _drawing(self, given: _Given, fields: Sequence[Tensor]) -> AbstractContextManager[None]:
        """Return the context of a micro-batch's dropout and noise."""
        update = Update(given.state, self.training.optimizer, self.training.options)
        return drawing(self.model, draws_of(update, fields))

    def _loss(
        self,
        given: _Given,
        weights: Sequence[Tensor],
        fields: Sequence[Tensor],
        near: NearBase | None = None,
    ) -> LossSums:
        """Return the loss of a micro-batch with these trained parts."""
        options = self.training.options
        chunks, kind = options.loss_chunks, options.token_loss
        spread = spread_of(self.parts)
        cross_entropy = partial(chunked_cross_entropy, chunks=chunks, spread=spread, kind=kind)
        run = partial(loss_of, self.model, fields, cross_entropy, near)
        return self._call(given, self._with_frozen(given, weights), run)

    def _with_frozen(self, given: _Given, weights: Iterable[Tensor]) -> dict[str, Tensor]:
        """Return all parts by name, from the trained ones."""
        parts = {each.name: part for each, part in zip(self.trained, weights, strict=True)}
        return parts | {e.name: part for e, part in zip(self.frozen, given.frozen, strict=True)}

    def _call(self, given: _Given, parts: Mapping[str, Tensor], run: Callable[[], Any]) -> Any:
        return self.parts.call(parts, dict(zip(self.buffers, given.buffers, strict=True)), run)

    def _near_base(self, given: _Given, fields: Sequence[Tensor]) -> NearBase | None:
        """Run the base on a micro-batch, if the step has a divergence from it."""
        kl, chunks = self.training.options.kl, self.training.options.loss_chunks
        if kl is None:
            return None
        with torch.no_grad(), self._as_base():
            output = self._base_output(given, fields)
        divergence = partial(chunked_divergence, chunks=chunks, spread=spread_of(self.parts))
        weights = counted_weights(fields, kl, self.training.options)
        return NearBase(kl, divergence, output, weights)

    @contextmanager
    def _as_base(self) -> Iterator[None]:
        """Let the model's layers be the base's inside; under an adapter they are those without
        it."""
        with self.stack.used(BASE), without_adapters(self.stack.templates()):
            yield

    def _base_output(self, given: _Given, fields: Sequence[Tensor]) -> BaseOutput:
        weights = (p.weight for p in given.state.parameters.values())
        parts = self._with_frozen(given, weights) if self.adapted else given.base

        def run() -> BaseOutput:
            return BaseOutput(self.model(*inputs_of(fields)), Projection(*self.model.output))

        return self._call(given, parts, run)

    def _over_shards(self, values: Iterable[Tensor]) -> Tensor:
        """Return the sum over all chips of scalars, one of each trained part; a part that several
        chips hold is counted once."""
        pairs = zip(values, self.trained, strict=True)
        total = torch.stack([value / each.cut.copies for value, each in pairs]).sum()
        return all_reduce(total, self.grid.axes)


@dataclass
class _Given:
    """The step's inputs, sorted."""

    state: TrainState
    frozen: list[Tensor]
    base: dict[str, Tensor]
    buffers: list[Tensor]
    lr: Tensor
    fields: list[Tensor]


def initial_values(
    graph: StepGraph, rank: int, tensor_of: Callable[[str], Tensor], buffers: dict[str, Tensor]
) -> Iterator[tuple[Input, Tensor]]:
    """Yield a chip's inputs before the first step, without learning rate and rows.

    Args:
        tensor_of: gives the whole value of a parameter by its name in a checkpoint.
    """
    held = {each.name: each for each in graph.held}
    for each in graph.inputs:
        kind, _, name = each.name.partition(".")
        if kind in ("model", "master", BASE) and name in held:
            yield each, held[name].part_on(rank, tensor_of).to(each.dtype)
        elif kind == "optimizer" or each.name in ("step", "bad_step"):
            yield each, torch.zeros(each.shape, dtype=each.dtype)
        elif each.name in buffers:
            yield each, buffers[each.name].clone()
