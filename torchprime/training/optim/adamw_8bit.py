"""AdamW with moments in 8 bits."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from torchprime.training.optim.adamw import AdamW
from torchprime.training.optim.blockwise import dequantize, quantize
from torchprime.training.optim.optimizer import Parameter, Slot

BLOCK = 256
SMALLEST_BLOCK = 32
# Smaller parameters keep fp32 moments, as in bitsandbytes.
SMALLEST = 4096


class AdamW8bit(AdamW):
    """AdamW whose moments are stored in 8 bits, as bitsandbytes' AdamW8bit has them.

    Blocks run along the rows of a matrix, so their values do not depend on the mesh. A block is the
    largest divisor of a row's length up to 256: rows of a multiple of 256 have bitsandbytes'
    blocks. Norms, biases, matrices of less than 4,096 elements and those whose blocks would be
    shorter than 32 keep fp32 moments.
    """

    def slots(self, parameter: Parameter) -> dict[str, Slot]:
        block = block_length(parameter)
        if block is None:
            return super().slots(parameter)
        codes, scales = Slot(parameter.dims, torch.uint8), Slot(parameter.dims, per=block)
        return {
            "exp_avg_codes": codes,
            "exp_avg_scales": scales,
            "exp_avg_sq_codes": codes,
            "exp_avg_sq_scales": scales,
        }

    def update(
        self,
        parameter: Parameter,
        weight: Tensor,
        gradient: Tensor,
        state: Mapping[str, Tensor],
        lr: Tensor,
        step: Tensor,
    ) -> dict[str, Tensor]:
        block = block_length(parameter)
        if block is None:
            return super().update(parameter, weight, gradient, state, lr, step)
        signs = {"exp_avg": True, "exp_avg_sq": False}
        moments = {
            name: dequantize(state[f"{name}_codes"], state[f"{name}_scales"], signed=signed)
            for name, signed in signs.items()
        }
        new = super().update(parameter, weight, gradient, moments, lr, step)
        stored = {"weight": new["weight"]}
        for name, signed in signs.items():
            codes, scales = quantize(new[name], block, signed=signed)
            stored |= {f"{name}_codes": codes, f"{name}_scales": scales}
        return stored


def block_length(parameter: Parameter) -> int | None:
    """Return the length of a parameter's blocks; None if its moments are fp32."""
    sizes = [parameter.shape[dim] for dim in parameter.own_dims]
    if len(sizes) < 2 or math.prod(sizes) < SMALLEST:
        return None
    lengths = range(min(BLOCK, sizes[-1]), SMALLEST_BLOCK - 1, -1)
    return next((length for length in lengths if sizes[-1] % length == 0), None)
