"""The builder of the whole step: gathers, micro-batches, clipping, optimizer, one graph.

    parts of weights and state, a batch's rows, a learning rate -> numbers, new weights and state

It is written with the project's own decoder, losses, optimizers and `finish_step`. The graph has
the tensors of one chip; collectives in it name axes. A backend runs it on chips, a test on a CPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule

from torchprime.errors import ConfigError
from torchprime.losses.chunks import Spread
from torchprime.losses.cross_entropy import chunked_cross_entropy
from torchprime.torch_native.tpu.collectives import all_reduce, barrier
from torchprime.torch_native.tpu.grid import BATCH, Grid
from torchprime.torch_native.tpu.loops import traced, traced_loop
from torchprime.torch_native.tpu.parameters import Held, Parts
from torchprime.training.backend import StepOptions
from torchprime.training.optim.optimizer import Optimizer
from torchprime.training.step import (
    ParameterState,
    StepSums,
    TrainState,
    Update,
    drawing,
    draws_of,
    finish_step,
    loss_of,
    micro_sums,
    supervised_weight,
)


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


def check_options(options: StepOptions) -> None:
    """Check that one program can compute a step with these options.

    Raises:
        ConfigError: it can't.
    """
    for key, given in (("task.loss.kl", options.kl), ("regularization", options.penalty)):
        if given is not None:
            raise ConfigError(
                f"{key}: given one, expected none: the step as one program for TorchTPU does not "
                "compute it yet. Use torch_xla (the extra tpu), or leave it out."
            )


def _in_order(x: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
    """Return both; a chunk of the loss starts after the sum so far is computed."""
    x, total = barrier([x, total])
    return x, total


class StepBuilder:
    """Builds the step of a model whose layers gather their weights.

    Raises:
        ConfigError: what one program cannot compute.
    """

    def __init__(self, parts: Parts, training: Training) -> None:
        check_options(training.options)
        self.parts, self.training = parts, training
        self.model, self.grid, self.stack = parts.model, parts.grid, parts.stack
        self.held, self.buffers = parts.held, parts.buffers
        self.trained = [each for each in self.held if each.trained]
        self.frozen = [each for each in self.held if not each.trained]

    def inputs(self, rows: Rows) -> list[Input]:
        """Return the step's inputs in order."""
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
            if self._has_master(each):
                found.append(Input(f"master.{each.name}", each.part, torch.float32, True))
        found += [Input(f"model.{each.name}", each.part, each.dtype, False) for each in self.frozen]
        for name, buffer in self.buffers.items():
            found.append(Input(name, tuple(buffer.shape), buffer.dtype, False))
        found.append(scalar("lr", donated=False))
        shape = (rows.micro_batches, rows.rows, rows.sequence)
        found += [Input(f"field.{n}", shape, kind, False) for n, kind in enumerate(rows.dtypes)]
        return found

    def _has_master(self, each: Held) -> bool:
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
        if stack.scan:
            stack.looking = True
            fields = [field[0] for field in given.fields]
            with torch.no_grad():
                self._loss(given, [p.weight for p in given.state.parameters.values()], fields)
            stack.looking = False
            stack.trace_loops()
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
            master = next(rest) if self._has_master(each) else None
            states[each.name] = ParameterState(info, weight, slots, master)
        state = TrainState(states, step, bad_step, spikes)
        frozen = [next(rest) for _ in self.frozen]
        buffers = [next(rest) for _ in self.buffers]
        return _Given(state, frozen, buffers, next(rest), list(rest))

    def _constants(self, given: _Given) -> list[Tensor]:
        """Return what each micro-batch reads: weights, frozen ones, buffers, the step's number."""
        weights = [p.weight for p in given.state.parameters.values()]
        return [*weights, *given.frozen, *given.buffers, given.state.step]

    def _again(self, given: _Given, constants: Sequence[Tensor]) -> _Given:
        """Return the same inputs with those constants, as a loop's body gets them."""
        rest = iter(constants)
        states = {name: p._replace(weight=next(rest)) for name, p in given.state.parameters.items()}
        frozen = [next(rest) for _ in given.frozen]
        buffers = [next(rest) for _ in given.buffers]
        state = TrainState(states, next(rest), given.state.bad_step, None)
        return _Given(state, frozen, buffers, given.lr, [])

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
        update = Update(given.state, self.training.optimizer, self.training.options)
        with torch.enable_grad(), drawing(self.model, draws_of(update, fields)):
            weights = (p.weight for p in given.state.parameters.values())
            leaves = [weight.detach().requires_grad_() for weight in weights]
            loss = self._loss(given, leaves, fields)
            gradients = list(torch.autograd.grad(loss.loss_sum, leaves))
        return micro_sums(loss, fields, update.options.num_sources), gradients

    def _loss(self, given: _Given, weights: Sequence[Tensor], fields: Sequence[Tensor]):
        """Return the loss of a micro-batch with these trained parts."""
        options = self.training.options
        cross_entropy = partial(
            chunked_cross_entropy,
            chunks=options.loss_chunks,
            spread=Spread(in_order=_in_order),
            kind=options.token_loss,
        )
        parts = {each.name: part for each, part in zip(self.trained, weights, strict=True)}
        parts |= {each.name: part for each, part in zip(self.frozen, given.frozen, strict=True)}
        buffers = dict(zip(self.buffers, given.buffers, strict=True))
        run = partial(loss_of, self.model, fields, cross_entropy)
        return self.parts.call(parts, buffers, run)

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
        if kind in ("model", "master") and name in held:
            yield each, held[name].part_on(rank, tensor_of).to(each.dtype)
        elif kind == "optimizer" or each.name in ("step", "bad_step"):
            yield each, torch.zeros(each.shape, dtype=each.dtype)
        elif each.name in buffers:
            yield each, buffers[each.name].clone()
