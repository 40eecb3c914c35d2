"""The choice of the attention core on XLA."""

from __future__ import annotations

import pytest

from torchprime.errors import ConfigError
from torchprime.torch_xla_models import attention


def test_kernel_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    assert attention.choose_kernel("auto", 1024) == ("reference", "auto on CPU")
    monkeypatch.setattr(attention.xr, "device_type", lambda: "TPU")
    assert attention.choose_kernel("auto", 1024)[0] == "splash"
    assert attention.choose_kernel("auto", 1000)[0] == "reference"
    assert attention.choose_kernel("splash_jax", 1024) == ("splash_jax", "as configured")
    for kernel in ("splash", "splash_jax"):
        match = f"attention_kernel={kernel} .*dataset.block_size=1000 is not a multiple"
        with pytest.raises(ConfigError, match=match):
            attention.choose_kernel(kernel, 1000)
