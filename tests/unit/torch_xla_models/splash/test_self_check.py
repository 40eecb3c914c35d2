"""The comparison that a run makes on its own chips, here on a mesh of virtual devices."""

from __future__ import annotations

import pytest
import torch

from torchprime.errors import RuntimeSetupError
from torchprime.torch_xla_models.device_tensors import DeviceTensors
from torchprime.torch_xla_models.mesh import make_mesh
from torchprime.torch_xla_models.splash import attention
from torchprime.torch_xla_models.splash.attention import Scores, SplashAttention
from torchprime.torch_xla_models.splash.self_check import Heads, check_kernel

pytestmark = pytest.mark.usefixtures("torchax")


def checked(window: int | None) -> str:
    mesh = make_mesh({"data": 1, "fsdp": 2, "tensor": 2}, {"data": 1, "fsdp": 1, "tensor": 1})
    core = SplashAttention(Scores(64, window, 2.0), mesh, ("data", "fsdp"), interpret=True)
    return check_kernel(core, "splash", Heads(4, 2), torch.bfloat16, DeviceTensors(mesh))


def test_a_right_kernel_passes() -> None:
    assert "splash agrees with the reference core here" in checked(window=40)


@pytest.mark.parametrize(("factor", "told"), [(1.05, "5.0%"), (float("nan"), "nan%")])
def test_a_wrong_gradient_is_refused(
    factor: float, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(function, arguments, *rest):
        found = right(function, arguments, *rest)
        return found if len(found) == 2 else (found[0], factor * found[1], found[2])

    right = attention.call_jax
    monkeypatch.setattr(attention, "call_jax", wrong)
    match = f"on this device dk differs .* by {told}.*splash_jax"
    with pytest.raises(RuntimeSetupError, match=match):
        checked(window=None)
