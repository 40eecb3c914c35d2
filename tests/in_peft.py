"""An adapter's description in PEFT's words, so that PEFT is the reference of the tests."""

from __future__ import annotations

from typing import Any

import peft

from torchprime.adapters.spec import ALL_LINEAR, AdapterSpec

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# PEFT compares the ends of names: `norm` would be `input_layernorm` too.
LAST_NORM = {"norm": "model.norm", "*.norm": "model.norm"}


def lora_config(spec: AdapterSpec, **more: Any) -> peft.LoraConfig:
    """Return PEFT's config of an adapter; `more` are settings that a spec does not have."""
    return peft.LoraConfig(
        r=spec.rank,
        lora_alpha=spec.alpha,  # pyright: ignore[reportArgumentType]
        use_rslora=spec.scaling == "rslora",
        use_dora=spec.dora,
        target_modules=list(LINEARS if spec.targets == (ALL_LINEAR,) else spec.targets),
        layers_to_transform=None if spec.layers is None else list(spec.layers),
        modules_to_save=[LAST_NORM.get(name, name) for name in spec.modules_to_train] or None,
        **more,
    )
