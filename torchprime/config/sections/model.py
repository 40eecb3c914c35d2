"""The section `model`: weights, architecture, tokenizer and attention kernel."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from torchprime.config.checks import at_least, not_empty, special_tokens
from torchprime.config.paths import HubNameOrFolder

# Attention kernels of a TPU: ours, and jax's.
SPLASH, SPLASH_BY_JAX = "splash", "splash_jax"
SPLASH_KERNELS = (SPLASH, SPLASH_BY_JAX)


@dataclass(frozen=True)
class ModelConfig:
    """The model's weights or its architecture; a checkpoint's own config.json takes precedence."""

    pretrained_model: HubNameOrFolder | None = None
    tokenizer_name: HubNameOrFolder | None = None
    attention_kernel: Literal["auto", "splash", "splash_jax", "flash", "flex", "reference"] = "auto"
    # HF config.json keys, to train from scratch or plan without the weights.
    architecture: dict[str, Any] | None = None
    add_special_tokens: list[str] = field(default_factory=list)
    # Initialization of rows for tokens without one; null: a larger tokenizer is refused.
    resize_embeddings: Literal["mean", "zeros"] | None = None
    pad_vocab_to_multiple: int | None = None  # null: 128 if rows are added

    def __post_init__(self) -> None:
        not_empty("model.pretrained_model", self.pretrained_model)
        not_empty("model.tokenizer_name", self.tokenizer_name)
        special_tokens("model.add_special_tokens", self.add_special_tokens)
        at_least("model.pad_vocab_to_multiple", self.pad_vocab_to_multiple, 1)

    @property
    def new_rows(self) -> Literal["mean", "zeros"] | None:
        """The initialization of new rows; adding tokens or padding requires one, too."""
        asked = self.add_special_tokens or self.pad_vocab_to_multiple is not None
        return self.resize_embeddings or ("mean" if asked else None)
