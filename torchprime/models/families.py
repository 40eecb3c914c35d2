"""The traits by which the model families differ: one entry of FAMILIES for each model_type.

    config.json's model_type  ->  FAMILIES  ->  architecture.py reads the other keys by its traits

A trait is a default that transformers uses for an absent key, or a switch of the decoder. So a
family that needs no new mathematics is one more entry (docs/add-a-model.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from torchprime.models.rope_config import RopeTraits


class Bias(NamedTuple):
    """A switch for the biases of some linear layers.

    Attributes:
        key: the key of config.json that turns them on or off; None: no key does.
        default: the value without that key.
    """

    key: str | None = None
    default: bool = False


NEVER, ALWAYS = Bias(), Bias(default=True)


@dataclass(frozen=True)
class Family:
    """The traits of one model_type.

    Attributes:
        hf_class: the class of transformers that an export names.
        context: max_position_embeddings where config.json has none.
        kv_heads: num_key_value_heads where it has none; None: as many as query heads.
        head_dim: the same for head_dim; None: hidden_size divided by the query heads.
        split_heads: head_dim must be hidden_size divided by the query heads.
        qkv_bias: of the projections to queries, keys and values.
        out_bias: of the attention's output projection.
        mlp_bias: of the gated unit's three projections.
        qk_norm: queries and keys are normalized per head before the rotation.
        window: the layers with a sliding window: none, all (`sliding_window`), or those from
            `max_window_layers` on (if `use_sliding_window`). With no_rope some layers do not
            rotate (`no_rope_layers`), and these may have a window.
        rope: defaults and kinds of the rope settings.
        fused_qkv: one projection `qkv_proj` computes queries, keys and values.
        fused_mlp: one projection `gate_up_proj` computes gate and up.
        multipliers: embeddings, scores, the parts that a layer adds, and logits are scaled by
            numbers of config.json (Granite).
        defaults: of other keys where config.json has none.
    """

    hf_class: str
    context: int
    kv_heads: int | None = None
    head_dim: int | None = None
    split_heads: bool = False
    qkv_bias: Bias = NEVER
    out_bias: Bias = NEVER
    mlp_bias: Bias = NEVER
    qk_norm: bool = False
    window: Literal["none", "all", "upper", "no_rope"] = "none"
    rope: RopeTraits = RopeTraits()
    fused_qkv: bool = False
    fused_mlp: bool = False
    multipliers: bool = False
    defaults: Mapping[str, Any] = field(default_factory=dict)


FAMILIES: dict[str, Family] = {
    "llama": Family(
        "LlamaForCausalLM",
        context=2048,
        qkv_bias=Bias("attention_bias"),
        out_bias=Bias("attention_bias"),
        mlp_bias=Bias("mlp_bias"),
    ),
    "mistral": Family("MistralForCausalLM", context=131_072, kv_heads=8, window="all"),
    "qwen2": Family(
        "Qwen2ForCausalLM", context=32_768, kv_heads=32, qkv_bias=ALWAYS, window="upper"
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        context=32_768,
        kv_heads=32,
        head_dim=128,
        qkv_bias=Bias("attention_bias"),
        out_bias=Bias("attention_bias"),
        qk_norm=True,
        window="upper",
    ),
    "granite": Family(
        "GraniteForCausalLM",
        context=2048,
        qkv_bias=Bias("attention_bias"),
        out_bias=Bias("attention_bias"),
        mlp_bias=Bias("mlp_bias"),
        multipliers=True,
    ),
    "smollm3": Family(
        "SmolLM3ForCausalLM",
        context=32_768,
        kv_heads=4,
        qkv_bias=Bias("attention_bias"),
        out_bias=Bias("attention_bias"),
        mlp_bias=Bias("mlp_bias"),
        window="no_rope",
        rope=RopeTraits(theta=2e6),
        defaults={"tie_word_embeddings": True, "sliding_window": None},
    ),
    "phi3": Family(
        "Phi3ForCausalLM",
        context=4096,
        split_heads=True,
        window="all",
        defaults={"rms_norm_eps": 1e-5, "sliding_window": None},
        fused_qkv=True,
        fused_mlp=True,
        rope=RopeTraits(
            partial=1.0,
            original=4096,
            kinds=("default", "longrope"),
            other_names={"su": "longrope", "yarn": "longrope"},
        ),
    ),
}
