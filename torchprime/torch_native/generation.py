"""Generation on torch.distributed: every process answers its part of each batch, in lockstep.

The layers are called as in training, so that FSDP2 gathers their weights. During a call
they stay gathered if memory allows, else they are gathered for every token. A collective waits for
all processes, so all of them run as many forwards as the one with the longest answer: once per
chunk they agree if another one follows. Along the tensor axis processes have the same rows, compute
their own heads, and choose the same tokens.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

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
from torchprime.host_memory import available_memory
from torchprime.models.attention import ReferenceAttention
from torchprime.models.decoder import CausalLM
from torchprime.torch_native.mesh import DataRank
from torchprime.torch_native.runtime import waiting
from torchprime.training.processes import Processes

# Shape suffixes: B batch, S sequence, H heads, K kv heads, h head size.


class PromptAttention(nn.Module):
    """torch's own attention with a mask, for prompts: training's kernels may be compiled for other
    shapes, and the reference core computes all scores at once. It has no soft-cap."""

    def __init__(self, head_dim: int, window: int | None) -> None:
        super().__init__()
        self.scale, self.window = head_dim**-0.5, window

    def prepare(self, segment_ids: Tensor) -> Tensor:
        """Return a mask, bool [B, 1, S, S], for segment_ids [B, S]: true where a key is attended
        to."""
        place = torch.arange(segment_ids.shape[1], device=segment_ids.device)
        distance = place[:, None] - place[None, :]
        seen = distance >= 0
        if self.window is not None:
            seen = seen & (distance < self.window)
        return (seen & (segment_ids[:, :, None] == segment_ids[:, None, :]))[:, None]

    def forward(self, q: Tensor, k: Tensor, v: Tensor, prepared: Tensor) -> Tensor:
        """Return [B, H, S, h] for q [B, H, S, h] and k, v [B, K, S, h]."""
        groups = q.shape[1] // k.shape[1]
        k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=prepared, scale=self.scale)


def prompt_core(head_dim: int, window: int | None, softcap: float | None) -> nn.Module:
    """Return the core that reads prompts: torch's own attention, or the reference core where the
    scores have a soft-cap."""
    if softcap is None:
        return PromptAttention(head_dim, window)
    return ReferenceAttention(head_dim, window, softcap)


class Generator:
    """Generator of answers with a placed model.

    Args:
        root: the module that FSDP2 was applied to last; calls its argument `instead`.
        rank: the part of each batch that this process answers.
        processes: all of them, since they make the same number of forwards.
        own_core: prompts are read with the layers' own attention core.
        compiled: the layers are compiled for training; generation runs them eagerly.
    """

    def __init__(
        self,
        model: CausalLM,
        root: nn.Module,
        device: torch.device,
        *,
        rank: DataRank,
        processes: Processes,
        own_core: bool,
        compiled: bool,
    ) -> None:
        self.model, self.root, self.device = model, root, device
        self.rank, self.processes = rank, processes
        self.make_core = None if own_core else prompt_core
        self.compiled = compiled

    def generate(
        self, prompts: Sequence[Sequence[int]], options: GenerateOptions
    ) -> dict[int, Answer]:
        """Return this process's answers, by the prompts' indexes."""
        batches = plan_batches(prompts, options, self.rank.count)
        answers: dict[int, Answer] = {}
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            stack.enter_context(cached_attention(self.model, make_core=self.make_core))
            if self.compiled:
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            stack.enter_context(self._gathered())
            for batch in batches:
                mine = batch.part(self.rank.index, self.rank.count)
                run = partial(self._answer, mine, prompts, options)
                answers |= self.root(instead=run)
        return answers

    @contextmanager
    def _gathered(self) -> Iterator[None]:
        """Keep the layers' weights gathered until the end, if there is room for all of them."""
        layers: list[Any] = list(self.model.model.layers.children())
        keep = not self.processes.largest(int(not self._fits()))
        for layer in layers:
            layer.set_reshard_after_forward(not keep, recurse=False)
        try:
            yield
        finally:
            for layer in layers:
                layer.reshard()
                layer.set_reshard_after_forward(True, recurse=False)
            assert isinstance(self.root, FSDPModule)
            self.root.reshard()

    def _fits(self) -> bool:
        """Return True if all weights, gathered, take less than half of the free memory."""
        needed = sum(p.numel() * p.element_size() for p in self.model.parameters())
        if self.device.type == "cuda":
            free = torch.cuda.mem_get_info(self.device)[0]
            free += torch.cuda.memory_reserved(self.device)
            free -= torch.cuda.memory_allocated(self.device)
        else:
            free = available_memory() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        return 2 * needed < free

    def _answer(
        self, batch: PromptBatch, prompts: Sequence[Sequence[int]], options: GenerateOptions
    ) -> dict[int, Answer]:
        ids, spans, rows = (
            torch.from_numpy(field).to(self.device)
            for field in (batch.ids, batch.spans, batch.numbers)
        )
        places = Prompts(spans, batch.prompt_slots)
        sampling = Sampling(*(t.to(self.device) for t in sampling_tensors(options)))
        decoding = Decoding(batch, prompts, options)

        def token_of(hidden: Tensor, number: int) -> Tensor:
            place = torch.full((), number, dtype=torch.int32, device=self.device)
            return choose(self.model.logits_of(hidden), options, sampling, rows, place)

        with waiting("reading prompts"):
            hidden, read = read_prompts(self.model, ids, places, batch.slots)
            cache = _allocated(read, batch.slots)
            token = token_of(hidden, 0)
            decoding.add([token.tolist()])
        for chunk in range(batch.chunks):
            with waiting("generating"):
                if not self.processes.largest(len(decoding.open)):
                    break
                tokens = []
                for made in range(chunk * batch.chunk, (chunk + 1) * batch.chunk):
                    place = batch.prompt_slots + made
                    slot = torch.full((), place, dtype=torch.int32, device=self.device)
                    hidden, new = next_hidden(self.model, token, places, slot, cache)
                    _write(cache, new, slot)
                    token = token_of(hidden, made + 1)
                    tokens.append(token)
                decoding.add(torch.stack(tokens).tolist())
        return decoding.found()


def _allocated(read: Cache, slots: int) -> Cache:
    """Return a cache of so many slots that begins with the prompts' keys and values."""
    missing = slots - read.keys[0].shape[-2]
    keys, values = (tuple(F.pad(t, (0, 0, 0, missing)) for t in part) for part in read)
    return Cache(keys, values)


def _write(cache: Cache, new: Cache, slot: Tensor) -> None:
    index = slot[None].long()
    for old, added in zip((*cache.keys, *cache.values), (*new.keys, *new.values), strict=True):
        old.index_copy_(-2, index, added)
