"""Checkpoints that can't be trained: messages with a way to fix it, and keys of other families.

A key that changes the mathematics but no weight's name or shape is found nowhere else. transformers
ignores it in a family that does not read it, so the checkpoint would run as another model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torchprime.models.config_values import ConfigValues

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

# Keys that other families read, and their values that change nothing; null never does.
FOREIGN: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("embedding_multiplier", "residual_multiplier", "logits_scaling"), (1,)),
    **dict.fromkeys(("logit_scale", "rotary_pct"), (1,)),
    **dict.fromkeys(("attention_multiplier", "query_pre_attn_scalar", "clip_qkv"), ()),
    **dict.fromkeys(("no_rope_layers", "attention_chunk_size"), ()),
    **dict.fromkeys(("rope_interleaved", "rope_interleave", "alibi"), (False,)),
    **dict.fromkeys(("parallel_attn", "use_parallel_residual"), (False,)),
    **dict.fromkeys(("use_qk_norm", "qk_layernorm"), (False,)),
}


def refuse_foreign_keys(values: ConfigValues, own: Sequence[str]) -> None:
    """Refuse keys with which a config asks for mathematics of another family.

    Args:
        own: keys that the model's family reads, or that agree with it.

    Raises:
        CheckpointError: such a key has a value that would change the model.
    """
    for key, neutral in FOREIGN.items():
        if key in values and key not in own and values.get(key) not in neutral:
            told = " or ".join(["null", *(f"{value!r}".lower() for value in neutral)])
            raise values.fault(key, f"{told}: this family does not read it")


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
