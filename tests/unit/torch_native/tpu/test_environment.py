"""Messages about packages that do not fit TorchTPU, and the variables that it needs."""

from __future__ import annotations

import pytest

from torchprime.errors import RuntimeSetupError
from torchprime.torch_native.tpu.environment import check_environment, on_cpu

FITS = {"torch-tpu": "0.2.0", "torch": "2.13.0"}


@pytest.mark.parametrize(
    ("installed", "told"),
    [
        ({"torch": "2.9.1"}, "torch-tpu: it is not installed, expected 0.2.x.*setup-torchtpu"),
        (FITS | {"torch-tpu": "0.20.1"}, "torch-tpu: given 0.20.1, expected 0.2.x"),
        (FITS | {"torch": "2.10.0"}, "torch: given 2.10.0, expected 2.13.x.*setup-torchtpu"),
        (FITS | {"torch_xla": "2.9.0"}, "torch_xla: given 2.9.0 beside torch-tpu, expected one"),
    ],
)
def test_what_does_not_fit_is_one_message(installed: dict[str, str], told: str) -> None:
    with pytest.raises(RuntimeSetupError, match=told):
        check_environment(installed.get)


def test_a_local_build_of_the_supported_torch_fits() -> None:
    check_environment((FITS | {"torch": "2.13.1+cpu"}).get)


def test_a_number_of_devices_that_is_given_stays() -> None:
    flag = "--xla_force_host_platform_device_count"
    assert on_cpu(4, {"XLA_FLAGS": f"{flag}=16"})["XLA_FLAGS"] == f"{flag}=16"
    assert on_cpu(4, {"XLA_FLAGS": "--xla_a=1"})["XLA_FLAGS"] == f"--xla_a=1 {flag}=4"
