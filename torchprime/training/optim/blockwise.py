"""Blockwise 8-bit quantization with bitsandbytes' dynamic maps, in arithmetic.

Source: Dettmers et al., arXiv:2110.02861. A block of values is divided by its largest magnitude,
and each quotient becomes the nearest of 256 levels. Levels are 0, 1 and seven powers of ten from
1e-6 to 1, of which each has twice as many levels as the one below it: 1 to 64 with a sign, 2 to 128
without. No table is read: on a TPU a lookup for each value would be slow.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

DECADES = 7
TINY = 1e-38


class Quantized(NamedTuple):
    """Values [..., n] in 8 bits.

    Attributes:
        codes: uint8 [..., n].
        scales: fp32 [..., n / block], the largest magnitude of each block.
    """

    codes: Tensor
    scales: Tensor


def quantize(values: Tensor, block: int, *, signed: bool) -> Quantized:
    """Quantize values [..., n] in blocks along the last dim, which n is a multiple of.

    Without a sign, a value above 0 gets at least the lowest level above 0: a second moment of 0
    beside a first moment that is not 0 would make a step of any size.
    """
    blocks = values.unflatten(-1, (-1, block))
    scales = blocks.abs().amax(dim=-1)
    normal = blocks / scales.clamp(min=TINY)[..., None]
    first = 1 if signed else 2
    index = _index(normal.abs(), first)
    if signed:
        # There is no level for -1.
        index = torch.where(normal < 0, 127 - index.clamp(max=127), 127 + index)
    else:
        index = torch.where(normal > 0, index.clamp(min=1), index)
    return Quantized(index.flatten(-2).to(torch.uint8), scales)


def dequantize(codes: Tensor, scales: Tensor, *, signed: bool) -> Tensor:
    """Return the values of codes, fp32."""
    index = codes.float().unflatten(-1, (scales.shape[-1], -1))
    if signed:
        index = index - 127
    level = _level(index.abs(), 1 if signed else 2)
    level = torch.where(index < 0, -level, level) if signed else level
    return (level * scales[..., None]).flatten(-2)


def _decade_of(values: Tensor, borders: list[float], first: int) -> tuple[Tensor, Tensor]:
    """Return the power of ten at which each value's decade ends, and the count of its levels.

    Args:
        borders: a value above border i is in decade i + 1 or a higher one.
    """
    power = torch.full_like(values, 10.0 ** (1 - DECADES))
    count = torch.full_like(values, float(first))
    for decade, border in enumerate(borders, start=1):
        above = values > border
        power = torch.where(above, 10.0 ** (decade + 1 - DECADES), power)
        count = torch.where(above, float(first << decade), count)
    return power, count


def _index(magnitude: Tensor, first: int) -> Tensor:
    """Return the index of the nearest level of magnitudes from 0 to 1; in the middle of two, that
    of the lower."""
    ends = [(10.0 ** (decade + 1 - DECADES), first << decade) for decade in range(DECADES)]
    # Levels are the middles of equal parts of a decade.
    highest = [power - 0.45 * power / count for power, count in ends]
    lowest = [0.1 * power + 0.45 * power / count for power, count in ends]
    borders = [(high + low) / 2 for high, low in zip(highest, lowest[1:], strict=False)]
    power, count = _decade_of(magnitude, borders, first)
    place = torch.ceil((magnitude - 0.1 * power) * count / (0.9 * power) - 1)
    index = 1 - first + count + torch.minimum(place.clamp(min=0), count - 1)
    index = torch.where(magnitude > lowest[0] / 2, index, 0.0)
    top = float((first << DECADES) - first + 1)
    return torch.where(magnitude > (highest[-1] + 1) / 2, top, index)


def _level(index: Tensor, first: int) -> Tensor:
    """Return the level of each index."""
    number = index + (first - 1)  # such that decade i begins at first x 2^i
    borders = [(first << decade) - 0.5 for decade in range(1, DECADES)]
    power, count = _decade_of(number, borders, first)
    level = 0.1 * power + (number - count + 0.5) * (0.9 * power / count)
    level = torch.where(index > 0, level, 0.0)
    return torch.where(number > (first << DECADES) - 0.5, 1.0, level)
