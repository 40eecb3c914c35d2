"""Generation: a program that reads a batch's prompts, and one that makes a chunk of tokens.

Each chip answers its rows of a batch, with the keys and values of its own heads. Layers gather
their weights as in training, for every token: memory holds one layer's at a time. A chunk's program
writes to the cache in place. All processes run as many chunks as the longest answer needs.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from torchprime.generation.cache import Cache, Prompts, cached_attention, next_hidden, read_prompts
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
from torchprime.models.attention import MakeCore
from torchprime.torch_native.chips import forward
from torchprime.torch_native.chips.client import Chips, Value
from torchprime.torch_native.chips.programs import Programs
from torchprime.torch_native.chips.values import same_on_all
from torchprime.torch_native.tpu.parameters import Parts
from torchprime.torch_native.tpu.shares import kv_heads
from torchprime.torch_native.tpu.step import Input

# Shape suffixes: B batch, S sequence, K kv heads, h head size, V vocab.


class Generator:
    """Generator of answers with weights on the chips.

    Args:
        make_core: makes the core that reads prompts; None takes the layers' own.
    """

    def __init__(
        self, parts: Parts, chips: Chips, programs: Programs, make_core: MakeCore | None
    ) -> None:
        self.parts, self.chips, self.programs = parts, chips, programs
        self.make_core = make_core
        self.client, self.model = chips.client, parts.model

    def generate(self, prompts: Sequence[Sequence[int]], options: GenerateOptions) -> list[Answer]:
        """Generate answers to prompts, in the prompts' order."""
        answers: dict[int, Answer] = {}
        with torch.no_grad(), cached_attention(self.model, make_core=self.make_core):
            for batch in plan_batches(prompts, options, self.chips.row_groups):
                answers |= self._answer(batch, prompts, options)
        every = {n: a for found in self.chips.processes.gather(answers) for n, a in found.items()}
        return [every[number] for number in range(len(prompts))]

    def _answer(
        self, batch: PromptBatch, prompts: Sequence[Sequence[int]], options: GenerateOptions
    ) -> dict[int, Answer]:
        """Return the answers of this process's rows of a batch."""
        parts = [
            batch.part(self.chips.row_group(rank), self.chips.row_groups)
            for rank in self.client.local
        ]
        decodings = [Decoding(part, prompts, options) for part in parts]
        sampling = sampling_tensors(options)
        fixed = [
            self.client.send([torch.from_numpy(part.spans) for part in parts]),
            self.client.send([torch.from_numpy(part.numbers) for part in parts]),
            *(same_on_all(self.client, each) for each in sampling),
        ]
        ids = self.client.send([torch.from_numpy(part.ids) for part in parts])
        shape = _Shape(parts[0], options, sampling)
        first, *cache = self.programs.run(
            ("prompts", *shape.ids, shape.key), partial(self._reader, shape), [ids, *fixed]
        )
        for decoding, tokens in zip(decodings, self.client.read(first), strict=True):
            decoding.add([tokens.tolist()])
        state = [first, self._number(batch.prompt_slots), self._number(1), *cache]
        for _ in range(batch.chunks):
            still = max(len(decoding.open) for decoding in decodings)
            if not self.chips.processes.largest(still):
                break
            made, *state = self.programs.run(
                ("tokens", shape.key), partial(self._chunk, shape), [*state, *fixed]
            )
            for decoding, tokens in zip(decodings, self.client.read(made), strict=True):
                decoding.add(tokens.tolist())
        return {n: a for decoding in decodings for n, a in decoding.found().items()}

    def _number(self, value: int) -> Value:
        return same_on_all(self.client, torch.tensor(value, dtype=torch.int32))

    def _token(self, shape: _Shape, hidden: Tensor, number: Tensor, fixed: Sequence[Tensor]):
        """Return the next token of each row, int32 [B], from hidden states [B, D]."""
        rows, *sampling = fixed[1:]
        logits = self.model.logits_of(hidden)
        return choose(logits, shape.options, Sampling(*sampling), rows, number)

    def _reader(self, shape: _Shape):
        """Trace the program that reads prompts: ids and fixed -> first tokens, keys, values."""

        def function(own: Sequence[Tensor]) -> list[Tensor]:
            ids, *fixed = own
            places = Prompts(fixed[0], shape.prompt_slots)
            hidden, read = read_prompts(self.model, ids, places, shape.slots)
            number = torch.zeros((), dtype=torch.int32)
            missing = shape.slots - shape.prompt_slots
            cache = [F.pad(each, (0, 0, 0, missing)) for each in (*read.keys, *read.values)]
            return [self._token(shape, hidden, number, fixed), *cache]

        ids = Input("ids", shape.ids, torch.int32, False)
        return forward.build(self.parts, [ids, *shape.fixed()], function)

    def _chunk(self, shape: _Shape):
        """Trace the program of a chunk: token, its slot and number, cache and fixed -> tokens
        [chunk, B], then the same state after them."""

        def body(state: Sequence[Tensor], fixed: Sequence[Tensor]) -> list[Tensor]:
            token, slot, number, *cache = state
            half = len(cache) // 2
            old = Cache(tuple(cache[:half]), tuple(cache[half:]))
            places = Prompts(fixed[0], shape.prompt_slots)
            hidden, new = next_hidden(self.model, token, places, slot, old)
            made = self._token(shape, hidden, number, fixed)
            pairs = zip(cache, (*new.keys, *new.values), strict=True)
            grown = [each.index_copy(-2, slot[None].long(), added) for each, added in pairs]
            return [made, slot + 1, number + 1, *grown, made.clone()]

        return forward.build_loop(
            self.parts, self._state(shape), shape.fixed(), body, length=shape.chunk
        )

    def _state(self, shape: _Shape) -> list[Input]:
        """Return the inputs that a chunk writes: token, slot, number, keys, values."""
        a, stack = self.model.architecture, self.parts.stack
        rows, number = (shape.rows,), partial(Input, shape=(), dtype=torch.int32)
        cache = (*rows, kv_heads(a, self.chips.grid.tensor), shape.slots, a.head_dim)
        entries = 1 if stack.scan else a.num_hidden_layers
        stacked = (a.num_hidden_layers, *cache) if stack.scan else cache
        dtype = self.parts.held[0].dtype  # the embedding's, which hidden states have
        return [
            Input("token", rows, torch.int32, True),
            number("slot", donated=True),
            number("number", donated=True),
            *(Input(f"cache.{n}", stacked, dtype, True) for n in range(2 * entries)),
        ]


class _Shape:
    """The shapes of a batch's programs on a chip."""

    def __init__(
        self, part: PromptBatch, options: GenerateOptions, sampling: Sequence[Tensor]
    ) -> None:
        self.ids, self.rows = part.ids.shape, len(part.rows)
        self.prompt_slots, self.slots, self.chunk = part.prompt_slots, part.slots, part.chunk
        self.options, self.sampling = options, sampling

    @property
    def key(self) -> Hashable:
        """The values that two batches of the same chunk program have in common."""
        return (self.rows, self.prompt_slots, self.slots, self.chunk, self.options.choice)

    def fixed(self) -> list[Input]:
        """Return the inputs that stay: spans, rows, sampling."""
        shapes = {"spans": (self.rows, 2), "rows": (self.rows,)}
        found = [Input(name, shape, torch.int32, False) for name, shape in shapes.items()]
        names = Sampling._fields
        pairs = zip(names, self.sampling, strict=True)
        return found + [Input(name, tuple(t.shape), t.dtype, False) for name, t in pairs]
