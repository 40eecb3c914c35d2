"""The traits by which the model families differ: one entry of FAMILIES for each model_type.

    config.json's model_type  ->  FAMILIES  ->  architecture.py reads the other keys by its traits

A trait is a default that transformers uses for an absent key, or a switch of the decoder. So a
family that needs no new mathematics is one more entry (docs/add-a-model.md).
"""

from __future__ import annotations

import re
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


# The keys of config.json with the soft-caps of attention's scores and of the logits.
SCORES_SOFTCAP, LOGITS_SOFTCAP = "attn_logit_softcapping", "final_logit_softcapping"
NEVER, ALWAYS = Bias(), Bias(default=True)
# Of the families with one key for the biases of all projections of attention.
ATTENTION_BIAS: dict[str, Any] = dict.fromkeys(("qkv_bias", "out_bias"), Bias("attention_bias"))


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
        qk_norm: queries and keys are normalized before the rotation, per head or over all heads.
        norm: the order in a norm: the weight multiplies the rounded result (llama), or the result
            in fp32 (wide), or one plus the weight does (plus_one).
        norms: the places of a layer's norms (decoder.NORM_NAMES).
        window: the layers with a sliding window: none, all (`sliding_window`), those from
            `max_window_layers` on (if `use_sliding_window`), or all but each `full_every`-th.
            With no_rope some layers do not rotate (`no_rope_layers`), and these may have a window.
        full_every: every so many layers, one has no window, where config.json has no layer_types;
            0: none.
        full_every_key: the key of config.json with this number, if there is one.
        rope: defaults and kinds of the rope settings.
        local_rope: the same for layers with a window, if they have a rope of their own.
        local_theta: the key of config.json with its base, in the spelling of transformers 4.
        activation: the key of the gated unit's activation, and its default.
        wide_rotation: queries and keys are rotated in fp32.
        scaled_embedding: embeddings are multiplied by the root of the hidden size.
        query_scale: the scores' scale is `query_pre_attn_scalar` to the power of -1/2, not the
            head size's.
        softcaps: the keys of attention's and the final soft-cap that the family computes.
        fused_qkv: one projection `qkv_proj` computes queries, keys and values.
        fused_mlp: one projection `gate_up_proj` computes gate and up.
        rope_neighbours: neighbouring numbers of a head are rotated together (rope.rotate).
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
    qk_norm: Literal["none", "head", "all"] = "none"
    norm: Literal["llama", "wide", "plus_one"] = "llama"
    norms: Literal["pre", "post", "both", "glm"] = "pre"
    window: Literal["none", "all", "upper", "no_rope", "pattern"] = "none"
    full_every: int = 0
    full_every_key: str | None = None
    rope: RopeTraits = RopeTraits()
    local_rope: RopeTraits | None = None
    local_theta: str = "rope_theta"
    activation: tuple[str, str] = ("hidden_act", "silu")
    wide_rotation: bool = False
    scaled_embedding: bool = False
    query_scale: bool = False
    softcaps: tuple[str, ...] = ()
    fused_qkv: bool = False
    fused_mlp: bool = False
    rope_neighbours: bool = False
    multipliers: bool = False
    defaults: Mapping[str, Any] = field(default_factory=dict)


GEMMA: dict[str, Any] = {
    **ATTENTION_BIAS,
    "kv_heads": 4,
    "head_dim": 256,
    "norm": "plus_one",
    "norms": "both",
    "window": "pattern",
    "activation": ("hidden_activation", "gelu_pytorch_tanh"),
    "scaled_embedding": True,
    "query_scale": True,
}
GEMMA_DEFAULTS: dict[str, Any] = {
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "query_pre_attn_scalar": 256,
    "tie_word_embeddings": True,
}
OLMO: dict[str, Any] = {
    **ATTENTION_BIAS,
    "context": 2048,
    "qk_norm": "all",
    "norm": "wide",
    "norms": "post",
    "wide_rotation": True,
    "defaults": {"rms_norm_eps": 1e-5},
}
FAMILIES: dict[str, Family] = {
    "llama": Family(
        "LlamaForCausalLM",
        context=2048,
        **ATTENTION_BIAS,
        mlp_bias=Bias("mlp_bias"),
    ),
    "mistral": Family("MistralForCausalLM", context=131_072, kv_heads=8, window="all"),
    "ministral": Family("MinistralForCausalLM", context=131_072, kv_heads=8, window="pattern"),
    "ministral3": Family(
        "Ministral3ForCausalLM",
        context=262_144,
        kv_heads=8,
        head_dim=128,
        window="all",
        rope=RopeTraits(kinds=("yarn",), query_growth=True),
        defaults={"rms_norm_eps": 1e-5, "sliding_window": None},
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM", context=32_768, kv_heads=32, qkv_bias=ALWAYS, window="upper"
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        context=32_768,
        kv_heads=32,
        head_dim=128,
        **ATTENTION_BIAS,
        qk_norm="head",
        window="upper",
    ),
    "glm4": Family(
        "Glm4ForCausalLM",
        context=131_072,
        kv_heads=2,
        head_dim=128,
        qkv_bias=Bias("attention_bias", default=True),
        fused_mlp=True,
        norms="glm",
        rope=RopeTraits(partial=0.5),
        rope_neighbours=True,
        defaults={"rms_norm_eps": 1.5625e-7},
    ),
    "granite": Family(
        "GraniteForCausalLM",
        context=2048,
        **ATTENTION_BIAS,
        mlp_bias=Bias("mlp_bias"),
        multipliers=True,
    ),
    "smollm3": Family(
        "SmolLM3ForCausalLM",
        context=32_768,
        kv_heads=4,
        **ATTENTION_BIAS,
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
    "gemma2": Family(
        "Gemma2ForCausalLM",
        **GEMMA,
        context=8192,
        full_every=2,
        softcaps=(SCORES_SOFTCAP, LOGITS_SOFTCAP),
        defaults=GEMMA_DEFAULTS
        | {"vocab_size": 256_000, SCORES_SOFTCAP: 50.0, LOGITS_SOFTCAP: 30.0},
    ),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        **GEMMA,
        context=131_072,
        qk_norm="head",
        full_every=6,
        full_every_key="sliding_window_pattern",
        rope=RopeTraits(theta=1e6),
        local_rope=RopeTraits(theta=1e4),
        local_theta="rope_local_base_freq",
        defaults=GEMMA_DEFAULTS | {"vocab_size": 262_208},
    ),
    "olmo2": Family("Olmo2ForCausalLM", **OLMO),
    "olmo3": Family(
        "Olmo3ForCausalLM",
        **OLMO,
        window="pattern",
        full_every=4,
        rope=RopeTraits(theta=5e5),
        local_rope=RopeTraits(theta=5e5),
    ),
}


@dataclass(frozen=True)
class Wrapper:
    """A model with a text model inside, such as one with images.

    Attributes:
        family: of the text model, if its config names none.
        inner: the families of text models by their own names in this wrapper.
        flat: config.json may have the text model's keys beside the wrapper's instead of in
            text_config.
        ropes: the rope types by the names that the text model has for them.
        defaults: of the text model's keys, where its config has none.
    """

    family: str
    inner: Mapping[str, str] = field(default_factory=dict)
    flat: bool = False
    ropes: Mapping[str, str] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)


WRAPPERS = {
    "gemma3": Wrapper("gemma3_text"),
    "mistral3": Wrapper("mistral"),
    # A token of text has three equal positions, so `mrope` is the default rope
    # (tests/parity/test_wrappers.py).
    "qwen2_5_vl": Wrapper(
        "qwen2",
        inner={"qwen2_5_vl_text": "qwen2", "qwen2_5_vl": "qwen2"},
        flat=True,
        ropes={"mrope": "default"},
        defaults={"rms_norm_eps": 1e-5, "rope_theta": 1e6, "max_window_layers": 80},
    ),
}
# Keys that a wrapper's config.json may have outside of text_config.
OUTSIDE = ("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings", "dtype")
# The objects with rope settings, and the two names of the type in them.
ROPES, ROPE_TYPES = ("rope_parameters", "rope_scaling"), ("rope_type", "type")
OF_IMAGES = re.compile("text_config|(vision|image|video)_")


def is_wrapper(config: Mapping[str, Any]) -> bool:
    """Return True for the config of a model with a text model inside."""
    return text_part(config) is not config


def text_part(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the config of the text model inside a wrapper's; another config unchanged."""
    inner, wrapper = config.get("text_config"), WRAPPERS.get(str(config.get("model_type")))
    if wrapper is None:
        return config
    if wrapper.flat and inner is None:
        inner = {key: value for key, value in config.items() if not OF_IMAGES.match(key)}
    if not isinstance(inner, Mapping):
        return config
    outside = {key: config[key] for key in OUTSIDE if config.get(key) is not None}
    found: dict[str, Any] = {"model_type": wrapper.family, **outside, **inner}
    found["model_type"] = wrapper.inner.get(str(found["model_type"]), found["model_type"])
    # transformers 5 ties by the wrapper's own key.
    if "tie_word_embeddings" in outside:
        found["tie_word_embeddings"] = outside["tie_word_embeddings"]
    ropes = {key: found[key] for key in ROPES if isinstance(found.get(key), Mapping)}
    for key, rope in ropes.items():
        names = {each: rope[each] for each in ROPE_TYPES if isinstance(rope.get(each), str)}
        found[key] = {**rope, **{k: wrapper.ropes.get(name, name) for k, name in names.items()}}
    said = {key for rope in ropes.values() for key in rope}
    return {key: value for key, value in wrapper.defaults.items() if key not in said} | found
