"""8-bit AdamW against bitsandbytes' own, and against its algorithm in double precision."""

from __future__ import annotations

import pytest
import torch
from bitsandbytes.functional import create_dynamic_map
from bitsandbytes.optim.adamw import AdamW8bit as TheirAdamW8bit
from torch import Tensor
from updates import LR, STEPS, ours, small_model

from torchprime.training.optim.adamw import AdamW
from torchprime.training.optim.adamw_8bit import AdamW8bit, block_length
from torchprime.training.optim.optimizer import Parameter

BETA1, BETA2, EPS, DECAY = 0.9, 0.95, 1e-6, 0.1
# Rows of 256 values, so that blocks are bitsandbytes', and parameters of 8 bits.
NAMES = ["model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight"]


def case() -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    weights, gradients = small_model()
    return {n: weights[n] for n in NAMES}, [{n: g[n] for n in NAMES} for g in gradients]


def rounded(values: Tensor, levels: Tensor) -> Tensor:
    """Values as they come back from 8 bits; a second moment above 0 stays above 0."""
    blocks = values.view(-1, 256)
    largest = blocks.abs().amax(1, keepdim=True)
    middles = (levels[1:] + levels[:-1]) / 2
    index = torch.bucketize(blocks / largest, middles)
    if levels[0] == 0:
        index = torch.where(blocks > 0, index.clamp(min=1), index)
    return torch.where(largest > 0, levels[index] * largest, 0.0).view(values.shape)


def in_double(weight: Tensor, gradients: list[Tensor]) -> Tensor:
    """The algorithm in double precision, on whole tensors."""
    signed, unsigned = (create_dynamic_map(s).double() for s in (True, False))
    w = weight.double()
    m, v = torch.zeros_like(w), torch.zeros_like(w)
    for step, gradient in enumerate(gradients, start=1):
        g = gradient.double()
        m, v = BETA1 * m + (1 - BETA1) * g, BETA2 * v + (1 - BETA2) * g * g
        root = (v / (1 - BETA2**step)).sqrt() + EPS
        w = w * (1 - LR * DECAY) - LR * (m / (1 - BETA1**step)) / root
        m, v = rounded(m, signed), rounded(v, unsigned)
    return w.float()


def distance(left: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    """The root mean square difference, the largest of all weights."""
    return max((left[n] - right[n]).pow(2).mean().sqrt().item() for n in NAMES)


def test_100_steps_are_those_of_the_algorithm() -> None:
    weights, gradients = case()
    assert len(gradients) == STEPS
    found = ours(AdamW8bit((BETA1, BETA2), EPS, DECAY), weights, gradients)
    exact = {n: in_double(weights[n], [g[n] for g in gradients]) for n in NAMES}
    plain = ours(AdamW((BETA1, BETA2), EPS, DECAY), weights, gradients)
    # Rounding of fp32 moves single values to the neighbouring level, and no more.
    assert distance(found, exact) < 0.05 * distance(exact, plain)


def test_100_steps_are_those_of_bitsandbytes() -> None:
    """Its CPU build first rounds to one of 65,536 equal steps, so codes differ."""
    weights, gradients = case()
    params = {n: torch.nn.Parameter(w.clone()) for n, w in weights.items()}
    theirs = TheirAdamW8bit(
        params.values(), lr=LR, betas=(BETA1, BETA2), eps=EPS, weight_decay=DECAY
    )
    for grads in gradients:
        for n, g in grads.items():
            params[n].grad = g.clone()
        theirs.step()
    assert all(theirs.state[p]["state1"].dtype == torch.uint8 for p in params.values())
    found = ours(AdamW8bit((BETA1, BETA2), EPS, DECAY), weights, gradients)
    expected = {n: p.detach() for n, p in params.items()}
    plain = ours(AdamW((BETA1, BETA2), EPS, DECAY), weights, gradients)
    assert distance(found, expected) < 0.5 * distance(expected, plain)


@pytest.mark.parametrize(
    ("shape", "stacked", "block"),
    [
        ((4096, 4096), False, 256),
        ((16, 256), False, 256),
        ((15, 256), False, None),  # too small
        ((896, 4864), False, 256),
        ((4864, 896), False, 224),
        ((172, 64), False, 64),
        ((100, 257), False, None),  # no divisor
        ((8192,), False, None),
        ((2, 8192), True, None),  # norms of two layers
        ((2, 64, 64), True, 64),
        ((2, 64, 32), True, None),
    ],
)
def test_blocks(shape: tuple[int, ...], stacked: bool, block: int | None) -> None:
    parameter = Parameter(("a.weight",), shape, torch.float32, stacked)
    assert block_length(parameter) == block
    slots = AdamW8bit().slots(parameter)
    assert ("exp_avg" in slots) == (block is None)
