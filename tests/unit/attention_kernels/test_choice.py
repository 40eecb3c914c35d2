"""The choice of an attention kernel."""

from __future__ import annotations

import pytest

from torchprime.attention_kernels.choice import Runtime, choose_kernel
from torchprime.errors import ConfigError

XLA, TORCHTPU = Runtime("XLA", "TPU", calls_jax=True), Runtime("TorchTPU", "TPU", calls_jax=False)
CPU = XLA._replace(device="CPU")


def test_auto_takes_our_kernels_where_they_run() -> None:
    for runtime in (XLA, TORCHTPU):
        assert choose_kernel("auto", 1024, runtime) == ("splash", "auto on TPU")
        assert choose_kernel("auto", 1000, runtime)[0] == "reference"
        assert choose_kernel("splash", 1024, runtime) == ("splash", "as configured")
    assert choose_kernel("auto", 1024, CPU) == ("reference", "auto on CPU")
    assert choose_kernel("splash_jax", 1024, XLA)[0] == "splash_jax"


@pytest.mark.parametrize(
    ("wanted", "block_size", "runtime", "said"),
    [
        ("splash", 1024, CPU, "runs on TPUs only, and this run is on CPU; use auto"),
        (
            "splash_jax",
            1024,
            TORCHTPU,
            "by PyTorch/XLA only, .* on TorchTPU; use auto",
        ),
        ("flash", 1024, TORCHTPU, "kernel of the GPU backend, and this run is on TorchTPU"),
        ("splash", 1000, TORCHTPU, "tiles of 128 positions, but dataset.block_size=1000 is not"),
    ],
)
def test_what_cannot_run_is_refused(
    wanted: str, block_size: int, runtime: Runtime, said: str
) -> None:
    with pytest.raises(ConfigError, match=f"model.attention_kernel={wanted} .*{said}"):
        choose_kernel(wanted, block_size, runtime)
