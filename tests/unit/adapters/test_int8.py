"""int8 with one scale for each output, against its definition in numpy float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from torchprime.adapters import int8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_nearest_code_of_each_weight(dtype: torch.dtype) -> None:
    weight = (torch.randn(32, 48, generator=torch.Generator().manual_seed(0)) * 0.02).to(dtype)
    ours = int8.quantize(weight)
    wide = weight.double().numpy()
    scales = np.abs(wide).max(axis=1) / 127
    codes = ours.codes.numpy().astype(np.float64)
    assert np.abs(codes).max() == 127
    np.testing.assert_allclose(ours.scales.numpy(), scales, rtol=1e-6)
    # Nearest: no weight is further than half a step from its code.
    assert (np.abs(codes - wide / scales[:, None]) <= 0.5 + 1e-4).all()
    restored = int8.dequantize(ours, torch.float32).double().numpy()
    np.testing.assert_allclose(restored, codes * scales[:, None], rtol=1e-6)


def test_a_row_of_zeros_stays_zero() -> None:
    weight = torch.zeros(2, 64)
    weight[1, 3] = -5.0
    restored = int8.dequantize(int8.quantize(weight), torch.float32)
    assert torch.equal(restored, weight)
