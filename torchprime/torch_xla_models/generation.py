"""Generation under XLA: a program that reads a batch's prompts, and one that makes a chunk of
tokens in a loop on the device.

Which slot comes next, which token number it is and what sampling depends on are data, so that the
two programs of a batch size and bucket serve every prompt. The cache is cut like activations: the
batch as the sharding table says, kv heads along the tensor axis where it divides them. A chunk
updates it in place.
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
    by_product,
    by_sums,
    cached_attention,
    next_hidden,
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
from torchprime.models.attention import ReferenceAttention
from torchprime.models.decoder import CausalLM
from torchprime.sharding import ShardingTable, Spec
from torchprime.torch_xla_models.device_tensors import DeviceTensors
from torchprime.torch_xla_models.linear import XlaLinear
from torchprime.torch_xla_models.mesh import axis_sizes, constrain
from torchprime.torch_xla_models.placement import Placed
from torchprime.torch_xla_models.remat import RecordedLoop

TENSOR = "tensor"


def _update_slot(cache: xb.Op, new: xb.Op, slot: xb.Op) -> xb.Op:
    indices = [slot.zeros_like()] * cache.shape().rank
    indices[-2] = slot
    return cache.dynamic_update_slice(new, indices)


# torch's own ways to write to a place that is data become a scatter, or a copy of the whole cache.
_WRITE = xor.register("torchprime_write_slot", _update_slot)


class _Step(nn.Module):
    """From tokens to logits, as a module: the loop gets its weights as arguments. What a loop's
    body reads without being given it, torch_xla takes for another tensor with the same data, and
    the next training step could not write to that data in place: it would be another program."""

    def __init__(self, model: CausalLM) -> None:
        super().__init__()
        self.model = model
        self.turned: Tensor | None  # the output projection as [D, V]
        self.register_buffer("turned", None, persistent=False)

    def forward(
        self, token: Tensor, padding: Tensor, slot: Tensor, cache: Cache
    ) -> tuple[Tensor, Cache]:
        hidden, new = next_hidden(self.model, token, padding, slot, cache)
        return self.logits(hidden), new

    def tensors(self) -> dict[str, Tensor]:
        """Weights, and copies of them, by name."""
        return {**dict(self.named_parameters()), **dict(self.named_buffers())}

    def logits(self, hidden: Tensor) -> Tensor:
        """fp32 [B, V]."""
        turned = self.model.output_weight.t() if self.turned is None else self.turned
        return torch.matmul(hidden, turned).float()


class Generator:
    """Answers prompts with a placed model.

    Args:
        tensors: makes tensors on the mesh and runs what was traced.
        table: says how activations are cut.
        placed: how parameters are.
    """

    def __init__(
        self,
        model: CausalLM,
        tensors: DeviceTensors,
        table: ShardingTable,
        placed: Mapping[str, Placed],
    ) -> None:
        self.model, self.tensors, self.placed = model, tensors, placed
        self.mesh = mesh = tensors.mesh
        self.step = _Step(model)
        self.loops: dict[tuple[Any, ...], RecordedLoop] = {}  # of a chunk, by shapes and choice
        sizes = axis_sizes(mesh)
        self.batch_axes = table.batch_axes()
        self.multiple = 1
        for axis in self.batch_axes:
            self.multiple *= sizes[axis]
        divides = model.architecture.num_key_value_heads % sizes.get(TENSOR, 1) == 0
        self.head_axes = (TENSOR,) if TENSOR in sizes and divides else ()

    def generate(self, prompts: Sequence[Sequence[int]], options: GenerateOptions) -> list[Answer]:
        """See Backend."""
        answers: dict[int, Answer] = {}
        batches = plan_batches(prompts, options, self.multiple)
        on_cpu = xr.device_type() == "CPU"
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            # Splash works in tiles of 128 positions, and a prompt's bucket may have 64.
            make_core, match = ReferenceAttention, by_sums if on_cpu else by_product
            stack.enter_context(cached_attention(self.model, self._cut_heads, make_core, match))
            if batches and on_cpu:
                stack.enter_context(self._turned())
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
        padding, rows = self.tensors.send_batch(
            [torch.from_numpy(batch.padding), torch.from_numpy(batch.rows)], ((),)
        )
        decoding = Decoding(batch, prompts, options)

        hidden, cache = read_prompts(self.model, ids, padding)
        cache = self._cut(_widened(cache, batch.slots - batch.ids.shape[1]))
        logits = self.step.logits(hidden)
        token = self._cut_rows(choose(logits, options, sampling, rows, self._scalar(0)))
        first = self._replicated(token)
        self.tensors.run([token, first, *cache.keys, *cache.values])
        decoding.add([first.cpu().tolist()])
        run_chunk = self._chunks(batch, options, token, cache, [padding, rows, *sampling])
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
        """What makes the next chunk of tokens [chunk, B] each time it is called. It updates the
        cache and `token` in place, and where it is.

        Args:
            fixed: padding, rows and sampling.
        """
        given = self.step.tensors()
        key = (batch.ids.shape, batch.chunk, batch.slots, options.choice)
        loop = self.loops.get(key)
        if loop is None:
            body = partial(self._one_token, options, len(cache.keys), list(given))
            loop = self.loops[key] = RecordedLoop(body)
        state = [token, self._scalar(batch.ids.shape[1]), self._scalar(1)]
        state += [*cache.keys, *cache.values]
        times = torch.zeros(batch.chunk, device=token.device)

        def run() -> Tensor:
            carry, (made,) = loop.run([*state, *fixed, *given.values()], [times])
            for old, new in zip(state, carry[: len(state)], strict=True):
                old.copy_(new)  # in place: the program reuses the buffer
            made = self._replicated(made)
            self.tensors.run([made, *state])
            return made

        return run

    def _one_token(
        self,
        options: GenerateOptions,
        layers: int,
        names: Sequence[str],
        carry: Sequence[Tensor],
        _: Sequence[Tensor],
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Return the body of a chunk's loop. It reads nothing that it is not given: weights so keep
        their place (`_Step`), and the loop serves every batch of its shapes."""
        token, slot, number, *rest = carry
        old = Cache(tuple(rest[:layers]), tuple(rest[layers : 2 * layers]))
        fixed, weights = rest[2 * layers : -len(names)], rest[-len(names) :]
        padding, rows, *sampling = fixed
        given = dict(zip(names, weights, strict=True))
        logits, new = functional_call(self.step, given, (token, padding, slot, old))
        # Each device goes on with its own rows: they need not meet before the chunk is made.
        made = self._cut_rows(choose(logits, options, Sampling(*sampling), rows, number))
        grown = self._cut(_written(old, new, slot))
        after = [made, slot + 1, number + 1, *grown.keys, *grown.values]
        return [*after, *fixed, *weights], [made]

    @contextmanager
    def _turned(self) -> Iterator[None]:
        """Meanwhile there is a copy of every matrix as [in, out]."""
        linears = {n: m for n, m in self.model.named_modules() if isinstance(m, XlaLinear)}

        def turned(name: str, weight: Tensor) -> Tensor:
            *stacked, rows, columns = self.placed[f"{name}.weight"].spec
            return constrain(weight.transpose(-1, -2), self.mesh, (*stacked, columns, rows))

        output = "model.embed_tokens" if self.model.lm_head is None else "lm_head"
        self.step.turned = turned(output, self.model.output_weight)
        copies = {name: turned(name, linear.weight) for name, linear in linears.items()}
        self.tensors.run([self.step.turned, *copies.values()])
        for name, linear in linears.items():
            linear.transposed = copies[name]
        try:
            yield
        finally:
            self.step.turned = None
            for linear in linears.values():
                linear.transposed = None

    def _scalar(self, value: int) -> Tensor:
        return self.tensors.send(torch.tensor(value, dtype=torch.int32), ())

    def _replicated(self, tensor: Tensor) -> Tensor:
        return constrain(tensor, self.mesh, ((),) * tensor.dim())

    def _cut_rows(self, token: Tensor) -> Tensor:
        return constrain(token, self.mesh, (self.batch_axes,))

    def _cut(self, cache: Cache) -> Cache:
        """Annotated: [(layers,) B, K, ., .]."""
        spec: Spec = (self.batch_axes, self.head_axes, (), ())

        def cut(tensor: Tensor) -> Tensor:
            return constrain(tensor, self.mesh, ((),) * (tensor.dim() - len(spec)) + spec)

        return Cache(tuple(map(cut, cache.keys)), tuple(map(cut, cache.values)))

    def _cut_heads(self, out: Tensor) -> Tensor:
        return constrain(out, self.mesh, (self.batch_axes, self.head_axes, (), ()))


def _widened(cache: Cache, slots: int) -> Cache:
    """With so many empty slots behind."""
    keys, values = (tuple(F.pad(t, (0, 0, 0, slots)) for t in part) for part in cache)
    return Cache(keys, values)


def _written(cache: Cache, new: Cache, slot: Tensor) -> Cache:
    keys, values = (
        tuple(_WRITE(old, each, slot) for old, each in zip(part, added, strict=True))
        for part, added in zip(cache, new, strict=True)
    )
    return Cache(keys, values)
