"""NF4 with double quantization: 4 bits a weight, a scale of 8 bits for each 64 (QLoRA).

Source: Dettmers et al., arXiv:2305.14314. Codes, scales and dequantized values equal those of
bitsandbytes. Blocks run along the weight's inputs. A scale is again quantized, in blocks of 256
scales, to one of 256 values (Dettmers et al., arXiv:2110.02861, dynamic tree quantization).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 64
SCALE_BLOCK = 256
_LIMIT = torch.finfo(torch.float32).max

# Quantiles of the normal distribution, scaled to [-1, 1]: arXiv:2305.14314, appendix E.
LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


class Nf4(NamedTuple):
    """A weight [O, I] in NF4.

    Attributes:
        packed: uint8 [O, G, I / G / 2]. Each of G groups of inputs is packed as halves: the first
            half in the high bits, the second in the low ones. (Neighbours in one byte, as
            bitsandbytes has them, cost a TPU more: they have to be interleaved.)
        scale_codes: uint8 [O, I / 64], indices of `scale_levels`; [1, O * I / 64] if a shard's
            inputs are no multiple of 64, and blocks run on from one output to the next.
        scale_scales: fp32 [ceil(O * I / 64 / 256)], one for each 256 scales.
        offset: fp32 scalar, the mean of all scales.
    """

    packed: Tensor
    scale_codes: Tensor
    scale_scales: Tensor
    offset: Tensor


@cache
def scale_levels() -> Tensor:
    """Return the 256 values of a quantized scale, fp32, in rising order, on the CPU.

    Each of seven powers of ten, from 1e-6 to 1, has twice as many values as the one below it.
    """
    positive: list[float] = []
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1, dtype=torch.float32, device="cpu")
        positive += (10.0 ** (exponent - 6) * ((edges[:-1] + edges[1:]) / 2)).tolist()
    values = [*positive, *(-value for value in positive), 0.0, 1.0]
    return torch.tensor(sorted(values), dtype=torch.float32, device="cpu")


def _nearest(values: Tensor, levels: Tensor) -> Tensor:
    """Return the index of the nearest level; in the middle of two, that of the lower."""
    middles = ((levels[:-1] + levels[1:]) / 2).to(values.device)
    return torch.bucketize(values, middles).to(torch.uint8)


def _scale_codes(normal: Tensor) -> Tensor:
    """Return the codes of normalized scales. bitsandbytes' CPU build first rounds them to one of
    65,536 equal steps from -1 to 1; its CUDA build does not, so few codes differ by one there."""
    steps = torch.floor((normal + 1) * 32767.5 + 0.5)
    return _nearest(steps * 2 / 65535 - 1, scale_levels())


def _normalized(values: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Return values divided by the largest of their block, and those largest ones.

    Args:
        values: [n], a multiple of block.
    """
    blocks = values.view(-1, block)
    largest = blocks.abs().amax(dim=1)
    inverse = 1 / largest.clamp(min=1e-38)
    return (blocks * inverse[:, None]).clamp(-1, 1).view(-1), largest


def quantize(weight_OI: Tensor, groups: int = 1) -> Nf4:
    """Quantize a weight whose size is a multiple of 64, and its inputs of 2 * groups.

    Args:
        weight_OI: on meta it gives shapes and types, and computes nothing.
        groups: of inputs that are packed apart; as many as there are shards along the inputs.
    """
    if weight_OI.is_meta:
        return Nf4(*map(torch.empty_like, _on_meta(weight_OI.shape, groups)))
    return _quantized(weight_OI, groups)


@cache
def _on_meta(shape: torch.Size, groups: int) -> Nf4:
    """Return the shapes and types. Even on meta the operations take 10 ms for each weight."""
    return _quantized(torch.empty(shape, device="meta"), groups)


def _quantized(weight_OI: Tensor, groups: int) -> Nf4:
    outputs, inputs = weight_OI.shape
    values, scales = _normalized(weight_OI.reshape(-1).float(), BLOCK)
    codes = _nearest(values, torch.tensor(LEVELS))
    offset = scales.mean()
    centred = scales - offset
    count = centred.numel()
    padded = torch.nn.functional.pad(centred, (0, -count % SCALE_BLOCK))
    normal, scale_scales = _normalized(padded, SCALE_BLOCK)
    rows = 1 if inputs % (BLOCK * groups) else outputs
    scale_codes = _scale_codes(normal)[:count].view(rows, -1)
    return Nf4(pack(codes.view(outputs, inputs), groups), scale_codes, scale_scales, offset)


def pack(codes_OI: Tensor, groups: int) -> Tensor:
    """Return 4-bit codes packed as `Nf4.packed` describes."""
    first, second = codes_OI.unflatten(1, (groups, 2, -1)).unbind(2)
    return (first << 4) | second


def unpack(packed: Tensor) -> Tensor:
    """Return codes uint8 [O, I]."""
    return torch.cat([packed >> 4, packed & 15], dim=-1).flatten(1)


Level = Callable[[Tensor], Tensor]  # codes -> fp32 levels of the same shape


def level_by_lookup(codes: Tensor) -> Tensor:
    """Return the level of each code from the table."""
    return torch.tensor(LEVELS, device=codes.device)[codes.to(torch.int32)]


def level_by_selects(codes: Tensor) -> Tensor:
    """Return the level of each code by a tree of selects on its bits: faster than a lookup where
    the compiler fuses it (a TPU); elsewhere it needs eight fp32 tensors."""
    nodes = [torch.tensor(value, device=codes.device) for value in LEVELS]
    for bit in range(4):
        is_set = ((codes >> bit) & 1).bool()
        pairs = zip(nodes[::2], nodes[1::2], strict=True)
        nodes = [torch.where(is_set, high, low) for low, high in pairs]
    return nodes[0]


def dequantize(w: Nf4, dtype: torch.dtype, level: Level = level_by_lookup) -> Tensor:
    """Return the weight [O, I]: level times scale in fp32, rounded once."""
    levels = level(unpack(w.packed))
    blocks = levels.view(w.scale_codes.shape[0], -1, BLOCK) * scales(w)[..., None]
    return blocks.view(levels.shape).to(dtype)


def scales(w: Nf4) -> Tensor:
    """Return the scale of each block, fp32, shaped like `scale_codes`."""
    table = scale_levels().to(w.scale_codes.device)
    normal = table[w.scale_codes.to(torch.int32)]
    of_each = w.scale_scales.repeat_interleave(SCALE_BLOCK)[: normal.numel()]
    product = normal * of_each.view(normal.shape)
    # The limits change nothing, but a compiler (XLA on the CPU) can't join product and sum into one
    # operation that rounds once.
    return product.clamp(-_LIMIT, _LIMIT) + w.offset
