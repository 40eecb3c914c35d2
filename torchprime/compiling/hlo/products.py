"""Operations of matrix products. On a TPU a product is a convolution whose batch dims are window
dims."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from torchprime.compiling.hlo.parsing import Computation, Instruction


def product_flops(
    computations: Mapping[str, Computation], inside: Computation, each: Instruction
) -> int:
    """Return the operations of one run of an instruction in matrix products, with those in the
    fusions that it calls; those in kernels are not visible here.

    Args:
        inside: the computation that contains it.
    """
    if each.kind == "convolution":
        return _convolution(inside, each)
    if each.kind == "dot":
        return _dot(inside, each)
    if each.kind not in ("fusion", "async-start"):
        return 0
    nested = [computations.get(name, {}) for name in each.called]
    return sum(product_flops(computations, c, i) for c in nested for i in c.values())


def _dot(inside: Computation, each: Instruction) -> int:
    left = inside[each.operands[0]].arrays[0]
    dims = (each.attribute("lhs_contracting_dims") or "").split(",")
    inner = math.prod(left.shape[int(dim)] for dim in dims if dim)
    return 2 * each.arrays[0].elements * inner


def _convolution(inside: Computation, each: Instruction) -> int:
    """Return two operations for every pair of an output position and a kernel tap that overlap
    inside."""
    left, right = (inside[name].arrays[0].shape for name in each.operands[:2])
    out = each.arrays[0].shape
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", each.rest)
    assert labels is not None
    in_, kernel, result = labels.groups()
    window = dict(part.split("=") for part in (each.attribute("window") or "").split())
    spatial = [label for label in in_ if label.isdigit()]  # numbers of window dims
    pairs = 1
    for label in spatial:
        dim = _window(window, int(label))
        pairs *= _meeting(left[in_.index(label)], out[result.index(label)], dim)
    return 2 * pairs * out[result.index("b")] * out[result.index("f")] * right[kernel.index("i")]


def _window(window: dict[str, str], number: int) -> tuple[int, int, int, int, int]:
    """Return size, stride, padding before, dilation of the left side and of the kernel, of one
    dim."""

    def of(key: str, default: str) -> str:
        return window[key].split("x")[number] if key in window else default

    return (
        int(of("size", "1")),
        int(of("stride", "1")),
        int(of("pad", "0_0").split("_")[0]),
        int(of("lhs_dilate", "1")),
        int(of("rhs_dilate", "1")),
    )


def _meeting(length: int, outputs: int, window: tuple[int, int, int, int, int]) -> int:
    """Return the pairs of output position and kernel tap that fall on an element, not on padding or
    a gap."""
    size, stride, before, left_gap, kernel_gap = window
    last = (length - 1) * left_gap
    return sum(
        0 <= place <= last and place % left_gap == 0
        for out in range(outputs)
        for place in (out * stride + tap * kernel_gap - before for tap in range(size))
    )
