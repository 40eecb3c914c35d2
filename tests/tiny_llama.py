"""The shape of the tiny models that tests train and save."""

from __future__ import annotations

from typing import Any

from transformers import LlamaConfig

SHAPE: dict[str, Any] = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)


def tiny_llama(vocab_size: int, **changes: Any) -> LlamaConfig:
    """Return transformers' config of a tiny Llama, with changes to SHAPE and other fields."""
    return LlamaConfig(**{"vocab_size": vocab_size, **SHAPE, **changes})
