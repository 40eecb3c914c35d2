"""The numbers that define a decoder, read from a Hugging Face config.json.

One dataclass describes every family: they differ in a few switches (families.py has each family's
traits) and in numbers. A key of config.json that would change the mathematics and that the decoder
does not implement is refused by name, so that a checkpoint is never run as another model. The
reference is transformers 5.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from torchprime.errors import CheckpointError
from torchprime.models.config_values import ConfigValues
from torchprime.models.families import (
    FAMILIES,
    LOGITS_SOFTCAP,
    SCORES_SOFTCAP,
    Bias,
    Family,
    text_part,
)
from torchprime.models.layer_kinds import LayerKind, read_layer_kinds, read_ropes
from torchprime.models.rope_config import Rope
from torchprime.models.unsupported import quantized, refuse_foreign_keys, unsupported_family

# Fields with defaults that a fingerprint has whatever their value, as in version 0.1.0.
IN_0_1_0 = (
    *("qkv_bias", "out_bias", "mlp_bias", "qk_norm", "tie_word_embeddings"),
    *("max_position_embeddings", "initializer_range"),
)
DROPOUTS = ("attention_dropout", "resid_pdrop", "embd_pdrop", "residual_dropout")
# Of the family with `Family.multipliers`.
MULTIPLIERS = (
    *("embedding_multiplier", "attention_multiplier", "residual_multiplier"),
    "logits_scaling",
)
# Keys of soft-caps, and the fields that have them.
SOFTCAPS = {SCORES_SOFTCAP: "attention_softcap", LOGITS_SOFTCAP: "final_softcap"}
ACTIVATIONS = ("silu", "swish", "gelu", "gelu_pytorch_tanh")  # of the gated unit
LARGEST_FACTOR = 10**6  # of a multiplier or soft-cap: far beyond it, fp32 overflows
MOST_LAYERS = 1024  # a layer is a module: an absurd number would fill the memory


@dataclass(frozen=True)
class Architecture:
    """The settings that define the decoder. Names follow config.json where it has them."""

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    ropes: tuple[Rope, ...]
    layers: tuple[LayerKind, ...]
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    fused_qkv: bool = False
    fused_mlp: bool = False
    residual_scale: float = 1.0
    logits_divisor: float = 1.0
    qk_norm_over_heads: bool = False
    norm: str = "llama"
    norms: str = "pre"
    activation: str = "silu"
    embedding_scale: float | None = None
    wide_rotation: bool = False
    query_pre_attn_scalar: float | None = None  # None: the head size
    rope_neighbours: bool = False
    attention_softcap: float | None = None
    final_softcap: float | None = None  # of the logits

    @property
    def rope(self) -> Rope:
        """The first rope, which is that of layers without a window if there are several."""
        return self.ropes[0]

    @property
    def windows(self) -> tuple[int | None, ...]:
        """The different windows of the layers' attention, in the layers' order."""
        return tuple(dict.fromkeys(kind.window for kind in self.layers))

    def with_layers(self, count: int) -> Architecture:
        """Return the architecture with the first `count` layers, or more of the last one."""
        more = self.layers[-1:] * (count - len(self.layers))
        return replace(self, num_hidden_layers=count, layers=(*self.layers[:count], *more))

    def described(self) -> dict[str, Any]:
        """Return the settings for a fingerprint.

        Layers of one kind, or with a window from one layer on, and one rope are written as version
        0.1.0 did. Fields that came later are left out at their defaults. So the fingerprints of
        older runs stay valid.
        """
        told = {
            each.name: value
            for each in fields(self)
            if (value := getattr(self, each.name)) != each.default or each.name in IN_0_1_0
        }
        layers, ropes = told.pop("layers"), [rope.described() for rope in told.pop("ropes")]
        windowed = [kind.window is not None for kind in layers]
        first = windowed.index(True) if True in windowed else 0
        window = layers[-1].window
        upper = tuple(LayerKind(window if i >= first else None) for i in range(len(layers)))
        if layers == upper and len(ropes) == 1:
            return {
                **told,
                "rope": ropes[0],
                "sliding_window": window,
                "windowed_from_layer": first,
            }
        return {**told, "layers": layers, "ropes": ropes}


def architecture_from_hf(config: Mapping[str, Any], *, where: str = "config.json") -> Architecture:
    """Read a parsed Hugging Face config of a supported family.

    Args:
        config: the keys of config.json, in the spelling of transformers 4 or 5.
        where: what to call the config in messages.

    Raises:
        CheckpointError: a key that is missing or has a value of a wrong type or size; an
            unsupported family, activation, rope type or layer pattern.
    """
    config = text_part(config)
    name = config.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        raise CheckpointError(f"{where}: {unsupported_family(config, tuple(FAMILIES))}")
    family = FAMILIES[name]
    values = ConfigValues({**family.defaults, **config}, where)
    _refuse_unknown_mathematics(values)
    refuse_foreign_keys(values, _own_keys(family))
    hidden, layers = values.integer("hidden_size"), _layers(values)
    heads = values.integer("num_attention_heads", most=2**14)
    context = values.integer("max_position_embeddings", family.context, most=2**40)
    head_dim = _head_dim(values, family, hidden, heads)
    architecture = Architecture(
        family=name,
        vocab_size=values.integer("vocab_size", most=2**24),
        hidden_size=hidden,
        intermediate_size=values.integer("intermediate_size", most=2**24),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=_kv_heads(values, family, heads),
        head_dim=head_dim,
        rms_norm_eps=values.number("rms_norm_eps", 1e-6, equal=True),
        ropes=read_ropes(values, context, family, head_dim),
        layers=read_layer_kinds(values, family, layers),
        qkv_bias=_has(values, family.qkv_bias),
        out_bias=_has(values, family.out_bias),
        mlp_bias=_has(values, family.mlp_bias),
        qk_norm=family.qk_norm != "none",
        qk_norm_over_heads=family.qk_norm == "all",
        norm=family.norm,
        norms=family.norms,
        activation=_activation(values, family),
        wide_rotation=family.wide_rotation,
        tie_word_embeddings=values.flag("tie_word_embeddings"),
        max_position_embeddings=context,
        initializer_range=values.number("initializer_range", 0.02, equal=True),
        fused_qkv=family.fused_qkv,
        fused_mlp=family.fused_mlp,
        **_scales(values, family, head_dim),
        rope_neighbours=family.rope_neighbours,
        **_softcaps(values, family),
    )
    return architecture


def _scales(values: ConfigValues, family: Family, head_dim: int) -> dict[str, float]:
    """Return the numbers that scale parts of the model, by the fields that have them: Granite's
    multipliers, or Gemma's two."""
    if family.multipliers:
        embedding, attention, residual, logits = (_factor(values, key, 1.0) for key in MULTIPLIERS)
        return {
            "embedding_scale": embedding,
            "query_pre_attn_scalar": attention**-2,
            "residual_scale": residual,
            "logits_divisor": logits,
        }
    found = {}
    if family.scaled_embedding:
        found["embedding_scale"] = values.integer("hidden_size") ** 0.5
    if family.query_scale and (scalar := values.integer("query_pre_attn_scalar")) != head_dim:
        found["query_pre_attn_scalar"] = scalar
    return found


def _own_keys(family: Family) -> tuple[str, ...]:
    """Return the keys of unsupported.FOREIGN that a family reads, or that agree with it."""
    return (
        *(MULTIPLIERS if family.multipliers else ()),
        *(("query_pre_attn_scalar",) if family.query_scale else ()),
        *(("no_rope_layers",) if family.window == "no_rope" else ()),
        *(("rope_interleaved", "rope_interleave") if family.rope_neighbours else ()),
        *(("use_qk_norm", "qk_layernorm") if family.qk_norm != "none" else ()),
    )


def _softcaps(values: ConfigValues, family: Family) -> dict[str, float]:
    """Return the soft-caps by the fields that have them; none for null, which turns one off."""
    found = {}
    for key, field in SOFTCAPS.items():
        if key in values:
            if key not in family.softcaps:
                raise values.fault(key, "null: this family is supported without it")
            found[field] = _factor(values, key)
    return found


def _factor(values: ConfigValues, key: str, default: float | None = None) -> float:
    if (found := values.number(key, default)) > LARGEST_FACTOR:
        raise values.fault(key, f"a number up to {LARGEST_FACTOR:,}")
    return found


def _layers(values: ConfigValues) -> int:
    return values.integer("num_hidden_layers", most=MOST_LAYERS)


def _has(values: ConfigValues, bias: Bias) -> bool:
    return bias.default if bias.key is None else values.flag(bias.key, bias.default)


def _kv_heads(values: ConfigValues, family: Family, heads: int) -> int:
    # If absent, the family's default holds; null means as many as query heads, in all families.
    default = heads if "num_key_value_heads" in values.content else family.kv_heads or heads
    kv_heads = values.integer("num_key_value_heads", default, most=2**14)
    if heads % kv_heads:
        raise CheckpointError(
            f"{values.where}: num_attention_heads={heads} is not a multiple of "
            f"num_key_value_heads={kv_heads}."
        )
    return kv_heads


def _head_dim(values: ConfigValues, family: Family, hidden: int, heads: int) -> int:
    """Return head_dim or, in the families without a default, the hidden size divided by the
    heads."""
    default = family.head_dim or hidden // heads
    if "head_dim" not in values and family.head_dim is None and hidden % heads:
        raise CheckpointError(
            f"{values.where}: hidden_size={hidden} is not a multiple of "
            f"num_attention_heads={heads}, and there is no head_dim."
        )
    head_dim = values.integer("head_dim", default, most=2**14) if "head_dim" in values else default
    if family.split_heads and head_dim * heads != hidden:
        raise CheckpointError(
            f"{values.where}: head_dim is {head_dim}, expected hidden_size={hidden} divided by "
            f"num_attention_heads={heads}: this family has no heads of another size."
        )
    if head_dim % 2 or not head_dim:
        raise CheckpointError(
            f"{values.where}: head_dim={head_dim} (or hidden_size / num_attention_heads) is not "
            "an even number; rotary positions turn pairs."
        )
    return head_dim


def _activation(values: ConfigValues, family: Family) -> str:
    key, default = family.activation
    name = values.get(key) or default
    if name not in ACTIVATIONS:
        raise values.fault(key, f"one of {', '.join(ACTIVATIONS)}; others are not supported")
    return "silu" if name == "swish" else name


def _refuse_unknown_mathematics(values: ConfigValues) -> None:
    if values.get("use_bidirectional_attention"):
        raise values.fault("use_bidirectional_attention", "false: only causal models are supported")
    for key in DROPOUTS:
        if values.number(key, 0.0, equal=True):
            raise values.fault(
                key,
                "0.0: dropout is not supported in fine-tuning. Set it to 0.0 in a copy of the "
                "checkpoint to train without it",
            )
    # MLX writes the second name, beside the first or alone.
    if quantization := values.get("quantization_config") or values.get("quantization"):
        raise CheckpointError(f"{values.where}: {quantized(quantization)}")
    if values.get("per_layer_config"):
        raise values.fault("per_layer_config", "null: layers of different shapes are not supported")
    # null counts as false here: transformers tests the value's truth.
    if "is_causal" in values.content and values.get("is_causal") is not True:
        raise values.fault("is_causal", "true: only causal models are supported")
