"""The choice of the loss under XLA. Its numbers: test_backend.py and test_loss_variants.py."""

from __future__ import annotations

import pytest

from torchprime.errors import ConfigError
from torchprime.torch_xla_models.loss import choose_loss


@pytest.mark.parametrize(
    ("wanted", "on_tpu", "kernel", "why"),
    [
        ("auto", False, "supervised", "auto on CPU: logits of the tokens that carry loss"),
        ("auto", True, "chunked", "auto on TPU: logits of all tokens"),
        ("chunked", False, "chunked", "as configured: logits of all tokens"),
        ("supervised", True, "supervised", "as configured: logits of the tokens that carry loss"),
    ],
)
def test_the_choice_and_its_reason(wanted: str, on_tpu: bool, kernel: str, why: str) -> None:
    assert choose_loss(wanted, on_tpu) == (kernel, f"{why}, in chunks")


def test_a_kernel_of_the_other_backend_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"task.loss_kernel=liger .* use auto, supervised or"):
        choose_loss("liger", on_tpu=False)
