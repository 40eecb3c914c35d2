"""Weights in int8 with one scale for each output."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Int8(NamedTuple):
    """A weight [O, I] in int8.

    Attributes:
        codes: int8 [O, I], from -127 to 127.
        scales: fp32 [O], the value of code 1.
    """

    codes: Tensor
    scales: Tensor


def quantize(weight_OI: Tensor) -> Int8:
    """Quantize each output's weights by their largest magnitude; halves round to even."""
    wide = weight_OI.float()
    scales = wide.abs().amax(dim=1) / 127
    # A row of zeros keeps scale 0 and codes 0.
    divisor = torch.where(scales == 0, 1.0, scales)
    codes = torch.round(wide / divisor[:, None]).clamp(-127, 127)
    return Int8(codes.to(torch.int8), scales)


def dequantize(w: Int8, dtype: torch.dtype) -> Tensor:
    """Return the weight [O, I]: code times scale in fp32, rounded once."""
    return (w.codes.float() * w.scales[:, None]).to(dtype)
