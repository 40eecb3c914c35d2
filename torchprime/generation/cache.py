"""Decoding with a KV cache: the decoder with stored keys and values of earlier tokens.

Every row of the cache has the same slots for its prompt. So every row writes the same slot next,
and one number gives its index. A prompt fills the last of its slots, or the first (`Prompts`).
Prefill (`read_prompts`) is an ordinary forward pass whose attention cores also return their keys
and values. It reads one or two prompts in each row, as segments. In decode (`next_hidden`) one
token per row goes through the layers, and its attention uses the cache and the token itself. Layers
only read the cache: a token's keys and values are returned beside the hidden states, and the caller
writes them into the next slot, in place.

Meanwhile `cached_attention` wraps every layer's core in a `CachedAttention`. The layers are
unchanged, and a container of layers needs one more method (`LayerStack.with_cache`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from torchprime.models.architecture import Architecture
from torchprime.models.attention import MakeCore, softcapped
from torchprime.models.decoder import CausalLM, LayerContext, core_for

# Shape suffixes: B batch, S sequence, D hidden, H heads, K kv heads, h head size, C cache slots.

# Cosines and sines of one rope, each [B, 1, S, pairs].
Rotary = tuple[Tensor, Tensor]


class Cache(NamedTuple):
    """Keys and values by layer, each [B, K, C, h]; one entry [layers, ...] for the layers that a
    container's loop has in one stack."""

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]


class Prompts(NamedTuple):
    """The places of a batch's prompts in the cache.

    Attributes:
        spans: int32 [B, 2], a prompt's first slot and its number of tokens.
        slots: the slots of a row for its prompt; generated tokens follow.
    """

    spans: Tensor
    slots: int

    def position(self, slot: Tensor) -> Tensor:
        """Return each row's position [B, 1] of the token whose place is `slot`, an int32 scalar."""
        return self.spans[:, 1:] + (slot - self.slots)


class CachedAttention(nn.Module):
    """Wrapper of an attention core during generation.

    Args:
        core: reads the prompts.
        finish: applied to the output [B, H, 1, h] for a single token, as hooks of the core are
            to its own.
        match: queries [B, K, H / K, h] and keys [B, K, C, h] to their products [B, K, H / K, C].
    """

    def __init__(
        self,
        core: nn.Module,
        a: Architecture,
        finish: Callable[[Tensor], Tensor] | None,
        match: Callable[[Tensor, Tensor], Tensor],
    ) -> None:
        super().__init__()
        self.core, self.finish, self.match = core, finish, match
        self.scale, self.softcap = a.head_dim**-0.5, a.attention_softcap
        self.cache: tuple[Tensor, Tensor] | None = None  # of this layer; None during prefill
        self.new: tuple[Tensor, Tensor] | None = None  # keys and values of the last call

    def forward(self, q: Tensor, k: Tensor, v: Tensor, prepared: Any) -> Tensor:
        """Run as a core does; with a cache `prepared` is `_mask` and there is one token per row."""
        if self.cache is None:
            self.new = k, v
            return self.core(q, k, v, prepared)
        out = self._one_token(q, k, v, *self.cache, prepared)
        # A compiler writes in place only if all reads of the old cache come first. So the values to
        # write depend on the output.
        after = out.view(*k.shape[:2], -1, k.shape[-1])[:, :, :1] * 0
        self.new = k + after, v + after
        return out if self.finish is None else self.finish(out)

    def _one_token(
        self, q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, mask: Tensor
    ) -> Tensor:
        """Return one softmax, in fp32, over the slots that the mask leaves and the token itself."""
        B, H, _, h = q.shape
        q = (q * self.scale).view(B, k.shape[1], -1, h)
        scores = softcapped(self.match(q, keys).float(), self.softcap) + mask
        own = softcapped((q.float() * k.float()).sum(-1, keepdim=True), self.softcap)
        top = torch.maximum(scores.amax(-1, keepdim=True), own)
        weights, own = torch.exp(scores - top), torch.exp(own - top)
        total = weights.sum(-1, keepdim=True) + own
        mixed = torch.matmul(weights.to(v.dtype), values).float() + own * v.float()
        return (mixed / total).to(q.dtype).view(B, H, 1, h)


def by_product(q: Tensor, keys: Tensor) -> Tensor:
    """Return `match` of a CachedAttention as one matrix product. The keys are on the left, so that
    a device reads them in their memory order, one slot after the other."""
    return torch.matmul(keys, q.transpose(-1, -2)).transpose(-1, -2)


def by_sums(q: Tensor, keys: Tensor) -> Tensor:
    """Return `match` as multiplications and sums, which a compiler fuses into one loop. If few
    queries share a head's keys, a matrix product on a CPU leaves most of its vector lanes empty.
    The sums are in fp32, as in a product of bf16. A head of more than 32 is summed in two stages:
    XLA on a CPU splits longer sums itself, and then stores the products in memory."""
    width = 32 if q.shape[-1] % 32 == 0 else q.shape[-1]
    q, keys = (t.float().unflatten(-1, (-1, width)) for t in (q, keys))
    return torch.stack([(keys * each[:, :, None]).sum(-1).sum(-1) for each in q.unbind(2)], 2)


@contextmanager
def cached_attention(
    model: CausalLM,
    finish: Callable[[Tensor], Tensor] | None = None,
    make_core: MakeCore | None = None,
    match: Callable[[Tensor, Tensor], Tensor] = by_product,
) -> Iterator[None]:
    """Wrap every layer's core in a CachedAttention; `make_core` replaces a core that can't be used
    for generation."""
    decoder: Any = model.model
    a = model.architecture
    attentions = [layer.self_attn for layer in decoder.layers.templates()]
    cores, preparers = [attention.core for attention in attentions], decoder.preparers
    for attention, core in zip(attentions, cores, strict=True):
        reads = core
        if make_core is not None:
            reads = core_for(a, a.windows[attention.kind], make_core)
        attention.core = CachedAttention(reads, a, finish, match)
    if make_core is not None:
        decoder.preparers = [core_for(a, window, make_core) for window in a.windows]
    try:
        yield
    finally:
        decoder.preparers = preparers
        for attention, core in zip(attentions, cores, strict=True):
            attention.core = core


def read_prompts(
    model: CausalLM, ids: Tensor, prompts: Prompts, slots: int
) -> tuple[Tensor, Cache]:
    """Run prompts through the model (prefill).

    Args:
        ids: integers [B, prompts.slots], each row a prompt at its right end; or [B / 2, S], each
            row a prompt at its left and one at its right end, which are two rows of the cache.
        slots: of the cache that decoding will use.

    Returns:
        The hidden states [B, D] of each prompt's last token, after the final norm, and the keys
        and values of the prompts' slots.
    """
    decoder: Any = model.model
    rows, length = ids.shape
    spans = prompts.spans.view(rows, -1, 2)
    offsets = (0, length - prompts.slots)[: spans.shape[1]]  # of the prompts' slots in a row
    places = torch.arange(length, dtype=torch.int32, device=ids.device)
    positions = segments = torch.zeros_like(ids, dtype=torch.int32)
    for number, offset in enumerate(offsets):
        first, count = spans[:, number].split(1, dim=1)
        position = places - (offset + first)
        inside = (position >= 0) & (position < count)
        positions = torch.where(inside, position, positions)
        segments = torch.where(inside, number + 1, segments)
    prepared = tuple(core.prepare(segments) for core in decoder.preparers)
    x_BSD = decoder.embed_tokens(ids)
    context = LayerContext(decoder.tables(positions, slots, x_BSD.dtype), prepared)
    hidden, cache = _through_layers(decoder, x_BSD, context, None)
    last = hidden[:, -1]
    if len(offsets) > 1:
        at_left = places == spans[:, 0, 1:] - 1
        left = torch.where(at_left[:, :, None], hidden, 0).sum(1)
        last = torch.stack([left, last], dim=1).flatten(0, 1)
        cache = Cache(*(_by_prompt(part, offsets, prompts.slots) for part in cache))
    return decoder.finish(last[:, None])[:, 0], cache


def _by_prompt(
    tensors: tuple[Tensor, ...], offsets: tuple[int, ...], slots: int
) -> tuple[Tensor, ...]:
    """Cut each prompt's slots out of keys or values [.., B / 2, K, S, h] -> [.., B, K, slots, h].
    The rows of a device stay on it."""
    cut = ([t[..., offset : offset + slots, :] for offset in offsets] for t in tensors)
    return tuple(torch.stack(prompts, dim=-4).flatten(-5, -4) for prompts in cut)


def next_rotary(
    model: CausalLM, prompts: Prompts, slot: Tensor, count: int, cache: Cache
) -> tuple[Rotary, ...]:
    """Return the cosines and sines of the next `count` tokens, each [count, B, 1, 1, pairs]: for a
    loop of `next_hidden` that computes none itself.

    Args:
        slot: int32 scalar tensor, the place of the first of these tokens.
    """
    decoder: Any = model.model
    later = torch.arange(count, dtype=torch.int32, device=slot.device)
    keys = cache.keys[0]
    tables = decoder.tables(prompts.position(slot) + later, keys.shape[-2], keys.dtype)
    return tuple(
        (cos.permute(2, 0, 1, 3)[:, :, :, None], sin.permute(2, 0, 1, 3)[:, :, :, None])
        for cos, sin in tables
    )


def next_hidden(
    model: CausalLM,
    ids: Tensor,
    prompts: Prompts,
    slot: Tensor,
    cache: Cache,
    rotary: tuple[Rotary, ...] = (),
) -> tuple[Tensor, Cache]:
    """Run one more token per row through the model (decode).

    Args:
        ids: integers [B].
        prompts: as in `read_prompts`.
        slot: int32 scalar tensor, the tokens' place: all slots from the prompts' to it are filled.
        rotary: the token's share of `next_rotary`; else it is computed here.

    Returns:
        The hidden states [B, D] after the final norm, and the keys and values to write to `slot`.
    """
    decoder: Any = model.model
    # The slots are the second to last dim, stacked or not.
    slots = cache.keys[0].shape[-2]
    places = torch.arange(slots, dtype=torch.int32, device=ids.device)
    masks = tuple(_mask(places, prompts, slot, window) for window in model.architecture.windows)
    x_BSD = decoder.embed_tokens(ids[:, None])
    if not rotary:
        rotary = decoder.tables(prompts.position(slot), slots, x_BSD.dtype)
    hidden, new = _through_layers(decoder, x_BSD, LayerContext(rotary, masks), cache)
    return decoder.finish(hidden)[:, 0], new


def _mask(places: Tensor, prompts: Prompts, slot: Tensor, window: int | None) -> Tensor:
    """Return an additive fp32 mask [B, 1, 1, C]: 0 if a slot holds an earlier token of the row,
    within the window. The token itself, which is in no slot yet, counts towards the window."""
    first, count = prompts.spans.split(1, dim=1)
    answer = places >= prompts.slots
    seen = torch.where(answer, places < slot, (places >= first) & (places < first + count))
    if window is not None:
        # Slots between a prompt at the left and its answer count for nothing.
        unused = torch.where(answer, 0, prompts.slots - first - count)
        seen = seen & (places + unused > slot - window)
    return torch.where(seen, 0.0, -1e30).to(torch.float32)[:, None, None]


def _through_layers(
    decoder: Any, x_BSD: Tensor, context: LayerContext, cache: Cache | None
) -> tuple[Tensor, Cache]:
    """Return hidden states [B, S, D] before the final norm, and new keys and values."""
    hidden, keys, values = decoder.layers.with_cache(x_BSD, context, cache)
    return hidden, Cache(tuple(keys), tuple(values))
