"""Generation under XLA: a prefill program for a batch's prompts, and a decode program for a chunk.

The next slot, the token number and the inputs of sampling are data. So for each batch size there is
one prefill program for each length of rows, and one decode program for each bucket. The cache is
sharded like activations: the batch as the sharding table says, kv heads along the tensor axis if it
divides them. A chunk updates it in place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
import torch_xla.core.xla_builder as xb
import torch_xla.core.xla_op_registry as xor
import torch_xla.runtime as xr
from torch import Tensor, nn
from torch.func import functional_call

from torchprime.generation.cache import (
    Cache,
    Prompts,
    Rotary,
    by_product,
    by_sums,
    cached_attention,
    next_hidden,
    next_rotary,
    read_prompts,
)
from torchprime.generation.decode import (
    Answer,
    Decoding,
    GenerateOptions,
    PromptBatch,
    Sampling,
    choose,
    plan_batches,
    sampling_tensors,
)
from torchprime.models.attention import softcapped
from torchprime.models.decoder import CausalLM
from torchprime.sharding import ShardingTable, Spec
from torchprime.torch_xla_models.attention import core_maker, prompt_core_maker
from torchprime.torch_xla_models.device_tensors import DeviceTensors
from torchprime.torch_xla_models.layers.loops import RecordedLoop
from torchprime.torch_xla_models.linear import LARGEST_TURNED, XlaLinear, few_rows_product
from torchprime.torch_xla_models.mesh import axis_sizes, constrain
from torchprime.torch_xla_models.placement import Placed

TENSOR = "tensor"


def _update_slot(cache: xb.Op, new: xb.Op, slot: xb.Op) -> xb.Op:
    indices = [slot.zeros_like()] * cache.shape().rank
    indices[-2] = slot
    return cache.dynamic_update_slice(new, indices)


# torch's own writes to a position that is data become a scatter, or a copy of the whole cache.
_WRITE = xor.register("torchprime_write_slot", _update_slot)


class _Step(nn.Module):
    """The computation from tokens to logits, as a module, so that the loop gets its weights as
    arguments. If a loop's body reads a tensor that is not an argument, torch_xla uses another
    tensor with the same data. The next training step could then not write to it in place: it would
    be another program."""

    def __init__(self, model: CausalLM) -> None:
        super().__init__()
        self.model = model
        self.turned: Tensor | None  # the output projection as [D, V], if it is small
        self.register_buffer("turned", None, persistent=False)
        self.large = False  # the output projection, on the CPU

    def forward(
        self, token: Tensor, prompts: Prompts, slot: Tensor, cache: Cache, *rotary: Rotary
    ) -> tuple[Tensor, Cache]:
        hidden, new = next_hidden(self.model, token, prompts, slot, cache, rotary)
        return self.logits(hidden), new

    def tensors(self) -> dict[str, Tensor]:
        """Return the weights, and their transposed copies, by name."""
        return {**dict(self.named_parameters()), **dict(self.named_buffers())}

    def logits(self, hidden: Tensor) -> Tensor:
        """Return logits, fp32 [B, V]."""
        weight = self.model.output_weight
        if self.large:
            logits = few_rows_product(hidden, weight)
        else:
            logits = torch.matmul(hidden, weight.t() if self.turned is None else self.turned)
        return softcapped(logits.float(), self.model.output.softcap)


class Generator:
    """Generator of answers with a placed model.

    Args:
        tensors: makes tensors on the mesh and executes traced programs.
        table: the sharding of activations.
        placed: the sharding of parameters.
        kernel: training's attention kernel, which reads prompts too.
    """

    def __init__(
        self,
        model: CausalLM,
        tensors: DeviceTensors,
        table: ShardingTable,
        placed: Mapping[str, Placed],
        kernel: str,
    ) -> None:
        self.model, self.tensors, self.placed = model, tensors, placed
        self.mesh = mesh = tensors.mesh
        self.step = _Step(model)
        self.loops: dict[tuple[Any, ...], RecordedLoop] = {}  # by shapes and choice
        sizes = axis_sizes(mesh)
        self.batch_axes = table.batch_axes()
        self.make_core = prompt_core_maker(core_maker(kernel, mesh, self.batch_axes))
        self.multiple = 1
        for axis in self.batch_axes:
            self.multiple *= sizes[axis]
        divides = model.architecture.num_key_value_heads % sizes.get(TENSOR, 1) == 0
        self.head_axes = (TENSOR,) if TENSOR in sizes and divides else ()

    def generate(self, prompts: Sequence[Sequence[int]], options: GenerateOptions) -> list[Answer]:
        """Generate answers to prompts, in the prompts' order."""
        answers: dict[int, Answer] = {}
        batches = plan_batches(prompts, options, self.multiple)
        on_cpu = xr.device_type() == "CPU"
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            match = by_sums if on_cpu else by_product
            cached = cached_attention(self.model, self._cut_heads, self.make_core, match)
            stack.enter_context(cached)
            if batches and on_cpu:
                stack.enter_context(self._for_few_rows())
            for batch in batches:
                answers |= self._answer(batch, prompts, options)
        return [answers[number] for number in range(len(prompts))]

    def _answer(
        self, batch: PromptBatch, prompts: Sequence[Sequence[int]], options: GenerateOptions
    ) -> dict[int, Answer]:
        sampling = Sampling(
            *(self.tensors.send(t, ((),) * t.dim()) for t in sampling_tensors(options))
        )
        (ids,) = self.tensors.send_batch([torch.from_numpy(batch.ids)], (self.batch_axes, ()))
        (spans,) = self.tensors.send_batch([torch.from_numpy(batch.spans)], ((), ()))
        (rows,) = self.tensors.send_batch([torch.from_numpy(batch.numbers)], ((),))
        decoding = Decoding(batch, prompts, options)

        places = Prompts(spans, batch.prompt_slots)
        hidden, cache = read_prompts(self.model, ids, places, batch.slots)
        cache = self._cut(_widened(cache, batch.slots - batch.prompt_slots))
        logits = self.step.logits(hidden)
        token = self._cut_rows(choose(logits, options, sampling, rows, self._scalar(0)))
        first = self._replicated(token)
        self.tensors.run([token, first, *cache.keys, *cache.values])
        decoding.add([first.cpu().tolist()])
        run_chunk = self._chunks(batch, options, token, cache, [spans, rows, *sampling])
        for _ in range(batch.chunks):
            if not decoding.open:
                break
            decoding.add(run_chunk().cpu().tolist())
        return decoding.found()

    def _chunks(
        self,
        batch: PromptBatch,
        options: GenerateOptions,
        token: Tensor,
        cache: Cache,
        fixed: Sequence[Tensor],
    ) -> Callable[[], Tensor]:
        """Return a function that generates the next chunk of tokens [chunk, B] on each call.

        It updates the cache, `token` and its position in place.

        Args:
            fixed: spans of the prompts, rows and sampling.
        """
        given = self.step.tensors()
        key = (len(batch.rows), batch.prompt_slots, batch.slots, batch.chunk, options.choice)
        loop = self.loops.get(key)
        if loop is None:
            counts = len(cache.keys), batch.prompt_slots
            body = partial(self._one_token, options, counts, list(given))
            loop = self.loops[key] = RecordedLoop(body)
        state = [token, self._scalar(batch.prompt_slots), self._scalar(1)]
        state += [*cache.keys, *cache.values]
        places = Prompts(fixed[0], batch.prompt_slots)

        def run() -> Tensor:
            # Inside of the loop, XLA on a CPU would compute them for each head of each layer.
            rotary = next_rotary(self.model, places, state[1], batch.chunk, cache)
            tables = [table for tables in rotary for table in tables]
            carry, (made,) = loop.run([*state, *fixed, *given.values()], tables)
            for old, new in zip(state, carry[: len(state)], strict=True):
                old.copy_(new)  # in place: the program reuses the buffer
            made = self._replicated(made)
            self.tensors.run([made, *state])
            return made

        return run

    def _one_token(
        self,
        options: GenerateOptions,
        counts: tuple[int, int],
        names: Sequence[str],
        carry: Sequence[Tensor],
        tables: Sequence[Tensor],
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Return the body of a chunk's loop. It reads only its arguments, so that weights keep
        their storage (`_Step`), and the loop serves every batch of its shapes.

        Args:
            counts: entries of the cache's keys, and slots of a prompt.
            tables: the token's cosines and sines, rope by rope.
        """
        layers, prompt_slots = counts
        token, slot, number, *rest = carry
        old = Cache(tuple(rest[:layers]), tuple(rest[layers : 2 * layers]))
        fixed, weights = rest[2 * layers : -len(names)], rest[-len(names) :]
        spans, rows, *sampling = fixed
        given = dict(zip(names, weights, strict=True))
        places = Prompts(spans, prompt_slots)
        rotary = zip(tables[::2], tables[1::2], strict=True)
        logits, new = functional_call(self.step, given, (token, places, slot, old, *rotary))
        # Each device continues with its own rows: no communication before the chunk is finished.
        made = self._cut_rows(choose(logits, options, Sampling(*sampling), rows, number))
        grown = self._cut(_written(old, new, slot))
        after = [made, slot + 1, number + 1, *grown.keys, *grown.values]
        return [*after, *fixed, *weights], [made]

    @contextmanager
    def _for_few_rows(self) -> Iterator[None]:
        """Keep a copy of every small matrix as [in, out] inside, and mark the large ones."""
        linears = {n: m for n, m in self.model.named_modules() if isinstance(m, XlaLinear)}
        output = "model.embed_tokens" if self.model.lm_head is None else "lm_head"
        weights = {name: linear.weight for name, linear in linears.items()}
        weights[output] = self.model.output_weight
        copies = {n: self._transposed(n, w) for n, w in weights.items() if _is_small(w)}
        self.tensors.run([*copies.values()])
        self.step.turned, self.step.large = copies.get(output), output not in copies
        for name, linear in linears.items():
            linear.transposed, linear.large = copies.get(name), name not in copies
        try:
            yield
        finally:
            self.step.turned, self.step.large = None, False
            for linear in linears.values():
                linear.transposed, linear.large = None, False

    def _transposed(self, name: str, weight: Tensor) -> Tensor:
        *stacked, rows, columns = self.placed[f"{name}.weight"].spec
        return constrain(weight.transpose(-1, -2), self.mesh, (*stacked, columns, rows))

    def _scalar(self, value: int) -> Tensor:
        return self.tensors.send(torch.tensor(value, dtype=torch.int32), ())

    def _replicated(self, tensor: Tensor) -> Tensor:
        return constrain(tensor, self.mesh, ((),) * tensor.dim())

    def _cut_rows(self, token: Tensor) -> Tensor:
        return constrain(token, self.mesh, (self.batch_axes,))

    def _cut(self, cache: Cache) -> Cache:
        """Annotate the cache [(layers,) B, K, ., .] with its sharding."""
        spec: Spec = (self.batch_axes, self.head_axes, (), ())

        def cut(tensor: Tensor) -> Tensor:
            return constrain(tensor, self.mesh, ((),) * (tensor.dim() - len(spec)) + spec)

        return Cache(tuple(map(cut, cache.keys)), tuple(map(cut, cache.values)))

    def _cut_heads(self, out: Tensor) -> Tensor:
        return constrain(out, self.mesh, (self.batch_axes, self.head_axes, (), ()))


def _is_small(weight: Tensor) -> bool:
    """Return True for a matrix, or a stack of them, of which a copy is made."""
    return weight.shape[-2] * weight.shape[-1] <= LARGEST_TURNED


def _widened(cache: Cache, slots: int) -> Cache:
    """Return the cache with so many empty slots appended."""
    keys, values = (tuple(F.pad(t, (0, 0, 0, slots)) for t in part) for part in cache)
    return Cache(keys, values)


def _written(cache: Cache, new: Cache, slot: Tensor) -> Cache:
    keys, values = (
        tuple(_WRITE(old, each, slot) for old, each in zip(part, added, strict=True))
        for part, added in zip(cache, new, strict=True)
    )
    return Cache(keys, values)
