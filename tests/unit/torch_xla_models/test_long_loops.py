"""XLA's CPU client computes correct values late in a long loop."""

from __future__ import annotations

import torch

from torchprime.config.schema import AXES
from torchprime.torch_xla_models.backend import XlaBackend
from torchprime.torch_xla_models.layers.scan import device_loop


def test_products_in_a_long_loop_are_right() -> None:
    """With as many threads as devices (PJRT_NPROC=4), part of the wide product is wrong from
    some round on: see `runtime._threads`."""
    mesh = {**dict.fromkeys(AXES, 1), "data": 4}
    send = XlaBackend(mesh, dict.fromkeys(AXES, 1)).tensors.send
    g = torch.Generator().manual_seed(0)
    layers = torch.randn(12, 512, 512, generator=g) * 0.05
    wide = torch.randn(512, 16384, generator=g) * 0.05
    start = send(torch.randn(64, 512, generator=g), (("data",), ()))
    weights = [send(layers, ((), (), ())), send(wide, ((), ()))]

    def layer(carry, given):
        return [torch.tanh(carry[0] @ given[0])], []

    def body(carry, number):
        hidden, layers, wide = carry
        (hidden,), _ = device_loop(layer, [hidden + 0.1 * number[0]], [layers])
        return [hidden, layers, wide], [hidden, (hidden @ wide).abs().sum(-1)]

    with torch.no_grad():
        _, found = device_loop(body, [start, *weights], [send(torch.arange(120.0), ((),))])
    hidden, sums = (t.cpu().double() for t in found)
    expected = (hidden @ wide.double()).abs().sum(-1)
    assert ((sums - expected).abs() / expected).max() < 1e-5
