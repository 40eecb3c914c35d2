"""Messages for checkpoints that cannot be trained name the fix that fits."""

from __future__ import annotations

from typing import Any

import pytest

from torchprime.models.unsupported import (
    DEQUANTIZE,
    TAKE_TEXT_PART,
    quantized,
    unsupported_family,
)

FAMILIES = ("llama", "qwen3")


@pytest.mark.parametrize(
    ("config", "said", "not_said"),
    [
        ({"model_type": "bert"}, "is 'bert'; supported are llama, qwen3.", "text_config"),
        ({}, "Use a checkpoint of one of these families.", "text_config"),
        ({"model_type": "x", "text_config": {"model_type": "qwen3"}}, TAKE_TEXT_PART, "neither"),
        ({"model_type": "x", "text_config": {"model_type": "y"}}, "neither supported.", "save_pre"),
        ({"model_type": "x", "text_config": "llama"}, "one of these families.", "text_config"),
    ],
)
def test_the_text_part_of_a_larger_model_is_offered(
    config: dict[str, Any], said: str, not_said: str
) -> None:
    told = unsupported_family(config, FAMILIES)
    assert said in told and not_said not in told


@pytest.mark.parametrize(
    ("given", "kind"),
    [
        ({"quant_method": "gptq", "bits": 4}, "quant_method='gptq', bits=4"),
        ({"load_in_4bit": True, "load_in_8bit": False}, "load_in_4bit=True)"),
        ({}, "of an unknown kind"),
        ("int8", "of an unknown kind"),
        (None, "of an unknown kind"),
    ],
)
def test_a_quantized_checkpoint_is_named_by_its_kind(given: object, kind: str) -> None:
    told = quantized(given)
    assert kind in told and DEQUANTIZE in told


def test_a_foreign_value_cannot_make_a_message_long() -> None:
    assert len(quantized({"quant_method": "x" * 10_000})) < 1000
    assert len(unsupported_family({"model_type": "x" * 10_000}, FAMILIES)) < 1000
