"""Dropout whose mask depends on seed, step, layer and position in the batch, and on nothing else.

A mesh, a backend, gradient accumulation or a resume changes which device computes an entry and
when, but not its position in the global batch, so the mask stays the same.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from torchprime.counter_bits import Position, kept, threefry


class CounterDropout(nn.Module):
    """Dropout by counter-based bits; without a position (evaluation) it changes nothing.

    Args:
        probability: that an entry is set to 0; the others are divided by 1 - probability.
        number: of the layer in the model, int32 scalar; kept as a frozen parameter, so that a scan
            over stacked layers gives each layer its own.

    Attributes:
        position: of the next forward; None turns dropout off.
        first: the number of the first entry of each token, if the input is a part of each.
    """

    def __init__(self, probability: float, number: int) -> None:
        super().__init__()
        self.probability = probability
        value = torch.tensor(number, dtype=torch.int32)
        self.number = nn.Parameter(value, requires_grad=False)
        self.position: Position | None = None
        self.first: int | Tensor = 0

    def forward(self, x_BSD: Tensor) -> Tensor:
        if self.position is None or self.probability == 0:
            return x_BSD
        seed, step, tokens = self.position
        key = threefry((seed, self.number), (step, torch.zeros_like(step)))
        mask = kept(key, tokens, x_BSD.shape[-1], self.probability, self.first)
        return torch.where(mask, x_BSD / (1 - self.probability), 0.0)


def set_position(model: nn.Module, position: Position | None) -> None:
    """Give all dropout layers below the position of the next forward; None turns dropout off."""
    for module in model.modules():
        if isinstance(module, CounterDropout):
            module.position = position
