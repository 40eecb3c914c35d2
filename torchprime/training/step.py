"""One optimizer update, in plain tensor operations, the same on every backend.

micro-batches -> loss sums and gradient sums -> divided once by the step's global weight -> clipped
-> optimizer. The backend gives `accumulate`, its way to run the micro-batches one after another (a
loop on the device under XLA), and calls all of it inside its compiled step. No code here reads
a device value on the host.

A step whose loss or gradient norm is not finite changes nothing. The number of the first such step
is stored in the state and every later update is a no-op, so the weights from before it survive
until the host reads the number (at the next logged step).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from torchprime.adapters.dropout import set_position
from torchprime.counter_bits import Position
from torchprime.data.blocks.batch import Batch
from torchprime.losses.chunks import ONE_DEVICE, Projection, Spread
from torchprime.losses.cross_entropy import LossSums, chunked_cross_entropy, token_weights
from torchprime.losses.divergence import chunked_divergence
from torchprime.models.decoder import CausalLM
from torchprime.models.embedding_noise import noise_on
from torchprime.training.backend import StepNumbers, StepOptions
from torchprime.training.optim.optimizer import Optimizer, Parameter
from torchprime.training.regularization.near_base import Kl, NearBase, base_of, weights_of_all
from torchprime.training.regularization.penalty import Anchor, penalty_gradient, weighted_squares
from torchprime.training.spikes import SKIPPED, STREAK, judge, spikes_in

# The order of the batch's fields in tuples, each [A, B/A, S] on the device.
FIELDS = ("input_ids", "targets", "position_ids", "segment_ids", "loss_weights")
# One more field if several sources are mixed: each token's source, for the losses by source. Then
# one for options.kl on all tokens: each token's weight in it. Then one if the step draws random
# numbers: each token's number in the global batch. And a last one with noise on embeddings: its
# scale for each token.
SOURCE_FIELD = "source_ids"

# hidden [b, S, D], output projection, targets [b, S], weights [b, S] -> the loss.
CrossEntropy = Callable[[Tensor, Projection, Tensor, Tensor], LossSums]
# One micro-batch's fields and the weights -> its sums and the gradients of these weights.
Micro = Callable[[tuple[Tensor, ...], Sequence[Tensor]], tuple[Tensor, list[Tensor]]]
Accumulate = Callable[[Micro, tuple[Tensor, ...], Sequence[Tensor]], tuple[Tensor, list[Tensor]]]

# Indexes in the metrics vector that a step returns.
# Followed by the step's terms, the loss's terms, and a loss sum for each source.
LOSS, GRAD_NORM, WEIGHT_SUM, BAD_STEP = range(4)


class ParameterState(NamedTuple):
    """A parameter, the facts for its optimizer, and the optimizer's state of it."""

    info: Parameter
    weight: Tensor
    slots: dict[str, Tensor]
    master: Tensor | None  # the fp32 copy of a bf16 weight
    anchor: Anchor | None = None  # of a penalty; no step writes it

    @property
    def wide(self) -> Tensor:
        """The weight in fp32."""
        return self.weight.float() if self.master is None else self.master


@dataclass
class TrainState:
    """The state that an update reads and writes.

    Attributes:
        parameters: those that are trained, by name. Frozen ones are not part of it.
    """

    parameters: dict[str, ParameterState]
    step: Tensor  # fp32 scalar, finished updates
    bad_step: Tensor  # fp32 scalar, 1-based number of the first update with a non-finite loss, or 0
    spikes: Tensor | None = None  # of spikes.py, if the run watches for them

    def tensors(self) -> list[Tensor]:
        """Return everything that an update writes, in a fixed order."""
        found = [self.step, self.bad_step]
        found += [] if self.spikes is None else [self.spikes]
        for parameter in self.parameters.values():
            found += [parameter.weight, *parameter.slots.values()]
            found += [] if parameter.master is None else [parameter.master]
        return found


@dataclass(frozen=True)
class Update:
    """One optimizer update: the state that it writes, its optimizer and its options."""

    state: TrainState
    optimizer: Optimizer
    options: StepOptions


@dataclass(frozen=True)
class StepSums:
    """The sums over an update's micro-batches.

    Attributes:
        losses: of `micro_sums`.
        supervised: the batch's global weight.
        gradients: of the loss sum, one per parameter of the state.
    """

    losses: Tensor
    supervised: Tensor
    gradients: Sequence[Tensor]


def host_fields(batch: Batch, options: StepOptions) -> list[Tensor]:
    """Return the batch's arrays in the order of FIELDS, each [B, S], on the host and not copied.

    With dropout or noise, the tokens' numbers come then, and with noise its scales.
    """
    fields = FIELDS if batch.source_ids is None else (*FIELDS, SOURCE_FIELD)
    found = [torch.from_numpy(getattr(batch, field)) for field in fields]
    if options.kl is not None and options.kl.on == "all":
        found.append(weights_of_all(batch))
    if options.random_seed is None:
        return found
    numbers = torch.arange(found[0].numel(), dtype=torch.int32)
    found.append(numbers.view(found[0].shape))
    if options.noise_alpha:
        scale = options.noise_alpha / np.sqrt(np.maximum(batch.segment_lengths(), 1))
        scale[batch.segment_ids == 0] = 0.0
        found.append(torch.from_numpy(scale.astype(np.float32)))
    return found


class Draws(NamedTuple):
    """The inputs of a micro-batch's random numbers.

    Attributes:
        noise_scale: fp32 [b, S], for noise on embeddings; None without it.
    """

    position: Position
    noise_scale: Tensor | None


def draws_of(update: Update, fields: Sequence[Tensor]) -> Draws | None:
    """Return the draws of a micro-batch with these fields; None for a step without any."""
    options = update.options
    if options.random_seed is None:
        return None
    step = update.state.step
    folded = torch.full((), options.random_seed, dtype=torch.int32, device=step.device)
    tokens, scale = fields[-2:] if options.noise_alpha else (fields[-1], None)
    return Draws(Position(folded, step.to(torch.int32), tokens), scale)


def loss_of(
    model: CausalLM,
    fields: Sequence[Tensor],
    cross_entropy: CrossEntropy,
    near: NearBase | None = None,
) -> LossSums:
    """Return the loss of one micro-batch whose fields are [b, S], with the divergence from the base
    if there is one."""
    input_ids, targets, position_ids, segment_ids, loss_weights = fields[: len(FIELDS)]
    hidden, output = model(input_ids, position_ids, segment_ids), Projection(*model.output)
    loss = cross_entropy(hidden, output, targets, loss_weights)
    return loss if near is None else near.add(loss, hidden, output)


def inputs_of(fields: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Return the model's inputs among the fields."""
    return fields[0], fields[2], fields[3]


def counted_weights(fields: Sequence[Tensor], kl: Kl, options: StepOptions) -> Tensor:
    """Return each token's weight in the divergence from the base, [b, S]."""
    if kl.on == "supervised":
        return token_weights(fields[FIELDS.index("targets")], fields[FIELDS.index("loss_weights")])
    drawn = 0 if options.random_seed is None else 2 if options.noise_alpha else 1
    return fields[len(fields) - drawn - 1]


@contextmanager
def drawing(model: CausalLM, draws: Draws | None) -> Iterator[None]:
    """Turn dropout and noise on for forward and backward passes, inside the context."""
    if draws is None:
        yield
        return
    position, scale = draws
    noisy = nullcontext()
    if scale is not None:
        noisy = noise_on(model.model.embed_tokens, position, scale)
    layers: Any = model.model.layers
    try:
        for layer in layers.templates():
            set_position(layer, position)
        with noisy:
            yield
    finally:
        for layer in layers.templates():
            set_position(layer, None)


class HeldModel(nn.Module):
    """A module around a model, so that a function which uses the model can be called with other
    weights."""

    def __init__(self, model: CausalLM) -> None:
        super().__init__()
        self.model = model

    def forward(self, function: Callable[[], Any]) -> Any:
        return function()


def source_sums(each: Tensor, sources: Tensor, count: int) -> list[Tensor]:
    """Return the losses [b, S] summed by source."""
    return [torch.where(sources == source, each, 0.0).sum() for source in range(count)]


def train_step(
    update: Update,
    model: CausalLM,
    batch: tuple[Tensor, ...],
    lr: Tensor,
    accumulate: Accumulate,
    spread: Spread = ONE_DEVICE,
    base: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """Run one update in place, all of it in tensor operations of one program.

    Args:
        batch: FIELDS, each [A, b, S] for A micro-batches; with several sources SOURCE_FIELD too.
        lr: fp32 scalar on the device.
        spread: the distribution of the loss over devices.
        accumulate: runs a function over the micro-batches and sums its results. The function
            reads the trained weights it is given: in a loop on the device they have to be the
            loop's. Frozen weights are the model's own.
        base: the weights that `Backend.place` made of its base.

    Returns:
        What `finish_step` returns.
    """
    parameters, options = update.state.parameters, update.options
    weights = [p.weight for p in parameters.values()]
    cross_entropy = partial(
        chunked_cross_entropy, chunks=options.loss_chunks, spread=spread, kind=options.token_loss
    )
    divergence = partial(chunked_divergence, chunks=options.loss_chunks, spread=spread)
    held, run_base = HeldModel(model), base_of(model, base)
    names = [f"model.{name}" for name in parameters]

    def near_base(fields: Sequence[Tensor], weights: Mapping[str, Tensor]) -> NearBase | None:
        if options.kl is None:
            return None
        output = functional_call(held, dict(weights), (partial(run_base, *inputs_of(fields)),))
        counted = counted_weights(fields, options.kl, options)
        return NearBase(options.kl, divergence, output, counted)

    def micro(fields: tuple[Tensor, ...], given: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        near = near_base(fields, dict(zip(names, given, strict=True)))
        with torch.enable_grad(), drawing(model, draws_of(update, fields)):
            leaves = [weight.detach().requires_grad_() for weight in given]
            by_name = dict(zip(names, leaves, strict=True))
            loss = functional_call(
                held, by_name, (partial(loss_of, model, fields, cross_entropy, near),)
            )
            gradients = list(torch.autograd.grad(loss.loss_sum, leaves))
        return micro_sums(loss, fields, options.num_sources), gradients

    with torch.no_grad():
        losses, gradients = accumulate(micro, batch, weights)
        return finish_step(update, StepSums(losses, supervised_weight(batch), gradients), lr)


def micro_sums(loss: LossSums, fields: Sequence[Tensor], num_sources: int) -> Tensor:
    """Return the values that are summed over micro-batches besides gradients: [loss sum, then its
    terms, then one per source]."""
    sums = [loss.loss_sum.detach(), *loss.terms]
    if num_sources > 1:
        sums += source_sums(loss.each, fields[len(FIELDS)], num_sources)
    return torch.stack(sums)


def sums_length(options: StepOptions) -> int:
    """Return the length of the result of `micro_sums`."""
    sources = options.num_sources
    return 1 + len(options.loss_terms) + (sources if sources > 1 else 0)


def supervised_weight(batch: Sequence[Tensor]) -> Tensor:
    """Return the weight of the tokens that carry loss, of fields of any shape in the order of
    FIELDS."""
    targets, weights = batch[FIELDS.index("targets")], batch[FIELDS.index("loss_weights")]
    return torch.where(targets < 0, 0.0, weights).sum()


def sum_of_whole(values: Iterable[Tensor]) -> Tensor:
    """Return the sum of scalars, one of each parameter that this process holds whole."""
    return torch.stack(list(values)).sum()


def finish_step(
    update: Update,
    sums: StepSums,
    lr: Tensor,
    *,
    gradient_scale: float = 1.0,
    over_shards: Callable[[Iterable[Tensor]], Tensor] = sum_of_whole,
) -> Tensor:
    """Update the weights in place from the sums of an update's micro-batches.

    Gradients are widened, divided and clipped one after another, and again for each use: in eager
    mode only one parameter's are in memory at a time.

    Args:
        sums: over the whole batch.
        gradient_scale: the factor that makes its gradients those of the loss sum.
        over_shards: sums scalars, one of each parameter's shard, over all shards of all parameters.

    Returns:
        fp32 [4]: the loss, which is the mean per supervised weight plus penalties; gradient norm
        before clipping, weight sum, and the number of the first update with a non-finite loss (0 if
        there is none). Then the step's terms, the loss's terms (per supervised weight too), and
        with several sources the loss sum of each, and the state of spikes.py if there is one.
    """
    # A batch of empty blocks only has weight 0; its sums are 0 as well.
    divisor = sums.supervised.clamp(min=1e-12)
    state, options = update.state, update.options
    terms = penalties(update, over_shards)
    loss = sum(terms.values(), sums.losses[0] / divisor)

    def of_objective(parameter: ParameterState, gradient: Tensor) -> Tensor:
        wide = gradient.float()
        wide = (wide if gradient_scale == 1 else wide * gradient_scale) / divisor
        return with_penalty(parameter, wide, options)

    def gradients() -> Iterator[Tensor]:
        return map(of_objective, state.parameters.values(), sums.gradients)

    norm = over_shards(g.pow(2).sum() for g in gradients()).sqrt()
    ready = clipped(gradients(), norm, options.max_grad_norm, options.max_grad_value)
    apply_update(update, ready, lr, loss, norm)
    own = [terms[name] for name in options.step_terms]
    numbers = torch.stack([loss, norm, sums.supervised, state.bad_step, *own])
    of_loss, by_source = sums.losses[1:].split(
        [len(options.loss_terms), len(sums.losses) - 1 - len(options.loss_terms)]
    )
    watched = [] if state.spikes is None else [state.spikes]
    return torch.cat([numbers, of_loss / divisor, by_source, *watched])


def penalties(
    update: Update, over_shards: Callable[[Iterable[Tensor]], Tensor]
) -> dict[str, Tensor]:
    """Return the values of the penalties on the weights before the update, by name."""
    penalty = update.options.penalty
    if penalty is None:
        return {}
    pairs = ((p.wide, p.anchor) for p in update.state.parameters.values())
    squares = (weighted_squares(wide, anchor) for wide, anchor in pairs if anchor is not None)
    return {penalty.name: penalty.strength * over_shards(squares)}


def with_penalty(parameter: ParameterState, gradient: Tensor, options: StepOptions) -> Tensor:
    """Return the gradient of the loss with its penalties, from that without."""
    if options.penalty is None or parameter.anchor is None:
        return gradient
    strength = options.penalty.strength
    return gradient + penalty_gradient(parameter.wide, parameter.anchor, strength)


def clipped(
    gradients: Iterable[Tensor], norm: Tensor, max_norm: float | None, max_value: float | None
) -> Iterator[Tensor]:
    """Scale to the global norm, then clamp each element, like torch's two functions in sequence."""
    out = iter(gradients)
    if max_norm is not None:
        factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        out = (g * factor for g in out)
    if max_value is not None:
        out = (g.clamp(-max_value, max_value) for g in out)
    return out


def apply_update(
    update: Update, gradients: Iterable[Tensor], lr: Tensor, loss: Tensor, norm: Tensor
) -> None:
    """Update parameters and state in place. Nothing changes if this or an earlier step was bad
    (loss or norm not finite); only counters change if it is a spike to be skipped."""
    state, spikes = update.state, update.options.spikes
    step, finite = state.step + 1, torch.isfinite(loss) & torch.isfinite(norm)
    counted, good = step, finite & (state.bad_step == 0)
    updated = good
    if spikes is not None and state.spikes is not None:
        # The optimizer's own count leaves skipped updates out.
        counted = step - state.spikes[SKIPPED] if spikes.skip else step
        spike, watched = judge(state.spikes, loss, norm, step, spikes)
        updated = good & ~spike if spikes.skip else good
        state.spikes.copy_(torch.where(good, watched, state.spikes))
    for parameter, gradient in zip(state.parameters.values(), gradients, strict=True):
        weight, slots, wide = parameter.weight, parameter.slots, parameter.wide
        new = update.optimizer.update(parameter.info, wide, gradient, slots, lr, counted)
        value = torch.where(updated, new.pop("weight"), wide)
        if parameter.master is not None:
            parameter.master.copy_(value)
        weight.copy_(value.to(weight.dtype))
        for name, tensor in new.items():
            slots[name].copy_(torch.where(updated, tensor, slots[name]))
    state.bad_step.copy_(torch.where(finite | (state.bad_step > 0), state.bad_step, step))
    state.step.copy_(torch.where(good, step, state.step))


def step_numbers(vector: Sequence[float], options: StepOptions) -> StepNumbers:
    """Return the numbers from the result of `finish_step`, once it is on the host."""
    names = (*options.step_terms, *options.loss_terms)
    rest = vector[BAD_STEP + 1 :]
    watched = [] if options.spikes is None else rest[-options.spikes.length :]
    rest = rest[: len(rest) - len(watched)]
    return StepNumbers(
        vector[LOSS],
        vector[GRAD_NORM],
        vector[WEIGHT_SUM],
        int(vector[BAD_STEP]),
        tuple(rest[len(names) :]),
        dict(zip(names, rest, strict=False)),
        spikes_in(watched),
        int(watched[STREAK]) if watched else 0,
    )


def forward_sums(loss: LossSums, fields: Sequence[Tensor], num_sources: int) -> Tensor:
    """Return the results of a forward pass without update: [loss sum, weight sum, then the loss sum
    by source]."""
    sums = micro_sums(loss, fields, num_sources)
    return torch.cat([sums[:1], loss.weight_sum.detach()[None], sums[1:]])


def eval_sums(vectors: Iterable[Sequence[float]]) -> tuple[float, ...]:
    """Return the sums over eval steps of the results of `forward_sums`."""
    return tuple(math.fsum(column) for column in zip(*vectors, strict=True))
