"""From a Hugging Face config.json to the numbers the decoder is built from.

One dataclass describes Llama 2/3/3.1/3.2, Qwen2/2.5, Qwen3 and Mistral: the families differ in four
switches (qkv bias, q/k norm, sliding window, rope scaling) and in numbers. Anything in a
config.json that would change the mathematics and that the decoder does not implement is refused by
name, so that a checkpoint is never run as something it is not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torchprime.errors import CheckpointError

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding: base and, for long contexts, how frequencies are scaled."""

    theta: float = 10_000.0
    kind: str = "default"  # default, linear, llama3
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192


@dataclass(frozen=True)
class Architecture:
    """Everything that shapes the decoder. Names follow config.json where it has them."""

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: Rope
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None
    windowed_from_layer: int = 0
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02

    def window_of_layer(self, index: int) -> int | None:
        """Attention window of a layer in positions, None for full causal attention."""
        return self.sliding_window if index >= self.windowed_from_layer else None


def architecture_from_hf(config: Mapping[str, Any], *, where: str = "config.json") -> Architecture:
    """Read a Hugging Face config (already parsed) of a supported family.

    Args:
        config: the keys of config.json, in the spelling of transformers 4 or 5.
        where: what to call the config in messages.

    Raises:
        CheckpointError: missing key, unsupported family, activation, rope type or layer pattern.
    """
    family = config.get("model_type")
    if family not in FAMILIES:
        raise CheckpointError(
            f"{where}: model_type is {family!r}; supported are {', '.join(FAMILIES)}. "
            "Use a checkpoint of one of these families."
        )
    needed = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    missing = [key for key in (*needed, "num_attention_heads") if config.get(key) is None]
    if missing:
        raise CheckpointError(f"{where}: the keys {', '.join(missing)} are missing.")
    _refuse_unknown_mathematics(config, where)
    heads = int(config["num_attention_heads"])
    hidden = int(config["hidden_size"])
    window, windowed_from = _sliding_window(config, family, where)
    llama_bias = (
        bool(config.get("attention_bias", False)) if family in ("llama", "qwen3") else False
    )
    kv_heads = config.get("num_key_value_heads")
    if kv_heads is None:
        # Absent, transformers falls back to the family's default, not to one kv head per head.
        kv_heads = {"mistral": 8, "qwen2": 32, "qwen3": 32}.get(family, heads)
    head_dim = config.get("head_dim") or (128 if family == "qwen3" else hidden // heads)
    architecture = Architecture(
        family=family,
        vocab_size=int(config["vocab_size"]),
        hidden_size=hidden,
        intermediate_size=int(config["intermediate_size"]),
        num_hidden_layers=int(config["num_hidden_layers"]),
        num_attention_heads=heads,
        num_key_value_heads=int(kv_heads),
        head_dim=int(head_dim),
        rms_norm_eps=float(config.get("rms_norm_eps", 1e-6)),
        rope=_rope(config, where),
        qkv_bias=family == "qwen2" or llama_bias,
        out_bias=llama_bias,
        mlp_bias=bool(config.get("mlp_bias", False)) if family == "llama" else False,
        qk_norm=family == "qwen3",
        sliding_window=window,
        windowed_from_layer=windowed_from,
        tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
        max_position_embeddings=int(config.get("max_position_embeddings", 2048)),
        initializer_range=float(config.get("initializer_range", 0.02)),
    )
    if architecture.num_attention_heads % architecture.num_key_value_heads:
        raise CheckpointError(
            f"{where}: num_attention_heads={architecture.num_attention_heads} is not a multiple of "
            f"num_key_value_heads={architecture.num_key_value_heads}."
        )
    return architecture


def _refuse_unknown_mathematics(config: Mapping[str, Any], where: str) -> None:
    activation = config.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise CheckpointError(
            f"{where}: hidden_act is {activation!r}; only silu (the gated SiLU unit) is supported."
        )
    if config.get("attention_dropout"):
        raise CheckpointError(
            f"{where}: attention_dropout is {config['attention_dropout']}; set it to 0.0: dropout "
            "is not supported in fine-tuning."
        )
    if config.get("quantization_config"):
        raise CheckpointError(
            f"{where}: the checkpoint is quantized (quantization_config); give the unquantized one."
        )


def _sliding_window(config: Mapping[str, Any], family: str, where: str) -> tuple[int | None, int]:
    """Window in positions and the first layer that has it, as transformers reads the keys."""
    # Absent, transformers takes 4096 in these families; null means no window.
    window = config.get("sliding_window", 4096)
    layers = int(config["num_hidden_layers"])
    if family in ("qwen2", "qwen3"):
        if not config.get("use_sliding_window", False):
            return None, 0
        first = int(config.get("max_window_layers", 28))
    elif family == "mistral":
        first = 0
    else:
        return None, 0
    types = config.get("layer_types")
    if types is not None and window is not None:
        windowed = [kind == "sliding_attention" for kind in types]
        first = windowed.index(True) if True in windowed else layers
        if not all(windowed[first:]):
            raise CheckpointError(
                f"{where}: layer_types alternate between full and sliding attention; supported is "
                "one switch from full to sliding (max_window_layers)."
            )
    return (int(window), first) if window is not None and first < layers else (None, 0)


def _rope(config: Mapping[str, Any], where: str) -> Rope:
    """Read rope_parameters (transformers 5) or rope_theta with rope_scaling (transformers 4).

    A checkpoint may carry both spellings for both readers; they must then agree.
    """
    new = dict(config.get("rope_parameters") or {})
    old = dict(config.get("rope_scaling") or {})
    old["rope_theta"] = config.get("rope_theta")
    new, old = ({k: v for k, v in keys.items() if v is not None} for keys in (new, old))
    if new and old:
        for key in ("rope_theta", "factor"):
            if key in new and key in old and not math.isclose(float(new[key]), float(old[key])):
                raise CheckpointError(
                    f"{where}: rope_parameters says {key}={new[key]} but rope_theta/rope_scaling "
                    f"say {old[key]}; make them agree."
                )
    keys = {**old, **new}
    kind = keys.get("rope_type", keys.get("type", "default")) or "default"
    if kind not in ("default", "linear", "llama3"):
        raise CheckpointError(
            f"{where}: rope type {kind!r} is not supported; supported are default, linear, llama3."
        )
    partial = keys.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    if partial not in (None, 1.0):
        raise CheckpointError(
            f"{where}: partial_rotary_factor={partial} is not supported (only 1.0)."
        )
    if kind != "default" and "factor" not in keys:
        raise CheckpointError(f"{where}: rope type {kind!r} needs the key factor.")
    original = keys.get("original_max_position_embeddings", config.get("max_position_embeddings"))
    return Rope(
        theta=float(keys.get("rope_theta", 10_000.0)),
        kind=kind,
        factor=float(keys.get("factor", 1.0)),
        low_freq_factor=float(keys.get("low_freq_factor", 1.0)),
        high_freq_factor=float(keys.get("high_freq_factor", 4.0)),
        original_max_position=int(original or 8192),
    )
