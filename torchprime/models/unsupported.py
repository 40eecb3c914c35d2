"""Messages for checkpoints that can't be trained, each with a way to fix it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

DEQUANTIZE = (
    "give the checkpoint it was made from (base_model on its card); or, where transformers can, "
    'write its values out: python -c "from transformers import AutoModelForCausalLM as M; '
    "M.from_pretrained('OLD').dequantize().save_pretrained('NEW')\""
)
TAKE_TEXT_PART = (
    'save it as a model of its own: python -c "import transformers as t; m = '
    "t.AutoModelForImageTextToText.from_pretrained('OLD', dtype='auto'); n = "
    "t.AutoModelForCausalLM.from_config(m.config.text_config, dtype=m.dtype); n.model = "
    "m.model.language_model; n.lm_head = m.lm_head; n.save_pretrained('NEW')\", then copy the "
    "tokenizer files to NEW"
)


def unsupported_family(config: Mapping[str, Any], families: Sequence[str]) -> str:
    """Return the reason why a model_type can't be trained."""
    told = f"model_type is {config.get('model_type')!r:.100}; supported are {', '.join(families)}."
    inner = config.get("text_config")
    if not isinstance(inner, Mapping):
        return f"{told} Use a checkpoint of one of these families."
    family = inner.get("model_type")
    told = f"{told} Its text part (text_config) is of the type {family!r:.100}"
    return f"{told}: {TAKE_TEXT_PART}." if family in families else f"{told}, neither supported."


def quantized(quantization_config: object) -> str:
    """Return the reason why a checkpoint with this entry in its config.json can't be trained."""
    told = quantization_config if isinstance(quantization_config, Mapping) else {}
    keys = ("quant_method", "bits", "load_in_4bit", "load_in_8bit", "fmt", "format")
    parts = [f"{key}={told[key]!r:.40}" for key in keys if told.get(key)]
    kind = ", ".join(parts) or "of an unknown kind"
    return f"the checkpoint is quantized (quantization_config: {kind}): {DEQUANTIZE}."
