"""The decoder: embedding, a stack of layers, final norm. Hugging Face parameter names.

ids -> embed_tokens -> layers (each: attention within segments, gated MLP) -> norm -> hidden states.
The output projection is separate (`output_weight`), because the loss multiplies by it chunk by
chunk and full logits are never computed in training.

Parallelism, remat, scan and kernels are applied from outside (design law 6). For that the layers
are pure functions of (hidden, context), held in a container that only chains them: a pass may
replace the container or a layer's attention core, or hang hooks on any module by its name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchprime.barriers import Barrier, gradients_stored, stored
from torchprime.models.architecture import Architecture
from torchprime.models.attention import MakeCore, ReferenceAttention, softcapped
from torchprime.models.layer_kinds import LayerKind
from torchprime.models.rope import RotaryTables, rotate

# Outputs inside a layer that remat can keep or compute again, by the names of a config
# (config/sections/remat.py): modules of the layer.
NAMED_OUTPUTS = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "core_out": "self_attn.core",
    "attn_out": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
}
# The same in families that compute several of them in one product.
FUSED_OUTPUTS = {
    **dict.fromkeys(("q", "k", "v"), "self_attn.qkv_proj"),
    **dict.fromkeys(("gate", "up"), "mlp.gate_up_proj"),
}


def output_module(name: str, layer: nn.Module) -> str:
    """Return the module of a layer that computes an output, by its name in NAMED_OUTPUTS."""
    part, _, last = FUSED_OUTPUTS.get(name, "").partition(".")
    fused = last and hasattr(layer.get_submodule(part), last)
    return FUSED_OUTPUTS[name] if fused else NAMED_OUTPUTS[name]


# Shape suffixes: B batch, S sequence, D hidden, H heads, K kv heads, h head size, F ffn, V vocab.


class LayerContext(NamedTuple):
    """The inputs that all layers read and none changes."""

    rotary: tuple[tuple[Tensor, Tensor], ...]  # per rope: cos and sin, each [B, 1, S, pairs]
    attention: tuple[Tensor, ...]  # per window: the core's `prepare(segment_ids)`

    def flat(self) -> list[Tensor]:
        """Return all tensors in a list, as a loop carries them."""
        return [*(each for tables in self.rotary for each in tables), *self.attention]

    def with_tensors(self, flat: Sequence[Tensor]) -> LayerContext:
        """Return a context of the same structure with the tensors of `flat`."""
        count = 2 * len(self.rotary)
        pairs = tuple((flat[i], flat[i + 1]) for i in range(0, count, 2))
        return LayerContext(pairs, tuple(flat[count:]))


# The norms of a layer: before attention, after it, before the gated unit, after it.
NORM_NAMES: dict[str, tuple[str | None, ...]] = {
    "pre": ("input_layernorm", None, "post_attention_layernorm", None),
    "post": (None, "post_attention_layernorm", None, "post_feedforward_layernorm"),
    "both": (
        *("input_layernorm", "post_attention_layernorm"),
        *("pre_feedforward_layernorm", "post_feedforward_layernorm"),
    ),
    "glm": (
        *("input_layernorm", "post_self_attn_layernorm"),
        *("post_attention_layernorm", "post_mlp_layernorm"),
    ),
}
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
}


class RMSNorm(nn.Module):
    """Root mean square norm (arXiv:1910.07467) over the last dim, statistics in fp32.

    Args:
        kind: the order of rounding and weight (`Family.norm`).
    """

    def __init__(self, size: int, eps: float, kind: str = "llama") -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size) if kind == "plus_one" else torch.ones(size))
        self.eps, self.kind = eps, kind

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        if self.kind == "llama":
            return self.weight * wide.to(x.dtype)
        weight = self.weight.float()
        return (wide * (weight + 1.0 if self.kind == "plus_one" else weight)).to(x.dtype)


class ScaledEmbedding(nn.Embedding):
    """An embedding whose rows are multiplied by a number, rounded to the weights' dtype."""

    def __init__(self, rows: int, size: int, scale: float) -> None:
        super().__init__(rows, size)
        self.scale = scale

    def forward(self, input: Tensor) -> Tensor:
        scale = torch.tensor(self.scale, device="cpu").to(self.weight.dtype).item()
        return super().forward(input) * scale


def core_for(a: Architecture, window: int | None, make_core: MakeCore) -> nn.Module:
    """Return the attention core of a model's layers with this window."""
    return make_core(a.head_dim, window, a.attention_softcap)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions; the core is replaceable."""

    def __init__(self, a: Architecture, kind: LayerKind) -> None:
        super().__init__()
        self.head_dim = a.head_dim
        self.kind, rope = a.windows.index(kind.window), kind.rope
        # The tables of queries and keys.
        of_q = rope if a.rope.query_growth is None else len(a.ropes)
        self.ropes = None if rope is None or of_q is None else (of_q, rope)
        self.rotate = partial(rotate, neighbours=a.rope_neighbours)
        D, wide, narrow = (
            a.hidden_size,
            a.num_attention_heads * a.head_dim,
            a.num_key_value_heads * a.head_dim,
        )
        self.parts = [wide, narrow, narrow]
        if a.fused_qkv:
            self.qkv_proj = nn.Linear(D, sum(self.parts), bias=a.qkv_bias)
        else:
            self.q_proj = nn.Linear(D, wide, bias=a.qkv_bias)
            self.k_proj = nn.Linear(D, narrow, bias=a.qkv_bias)
            self.v_proj = nn.Linear(D, narrow, bias=a.qkv_bias)
        self.fused = a.fused_qkv
        self.o_proj = nn.Linear(wide, D, bias=a.out_bias)
        self.norm_place = "heads" if a.qk_norm_over_heads else "head" if a.qk_norm else "none"
        if a.qk_norm:
            over_heads = a.qk_norm_over_heads
            self.q_norm = RMSNorm(wide if over_heads else a.head_dim, a.rms_norm_eps, a.norm)
            self.k_norm = RMSNorm(narrow if over_heads else a.head_dim, a.rms_norm_eps, a.norm)
        # The core scales by the head size; this is what is left.
        scalar = a.query_pre_attn_scalar
        self.query_factor = None if scalar is None else (a.head_dim / scalar) ** 0.5
        self.core: nn.Module = core_for(a, kind.window, ReferenceAttention)

    def forward(self, x_BSD: Tensor, context: LayerContext) -> Tensor:
        B, S, _ = x_BSD.shape
        q, k, v = self._projected(x_BSD)
        if self.norm_place == "heads":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (part.view(B, S, -1, self.head_dim) for part in (q, k, v))
        v_BKSh = v.transpose(1, 2)
        if self.norm_place == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        if self.query_factor is not None:
            q = q * self.query_factor
        q_BHSh, k_BKSh = q.transpose(1, 2), k.transpose(1, 2)
        if self.ropes is not None:
            dtype, (of_q, of_k) = x_BSD.dtype, self.ropes  # the tables may be wider
            q_BHSh = self.rotate(q_BHSh, *context.rotary[of_q]).to(dtype)
            k_BKSh = self.rotate(k_BKSh, *context.rotary[of_k]).to(dtype)
        mixed = self.core(q_BHSh, k_BKSh, v_BKSh, context.attention[self.kind])
        return self.o_proj(mixed.transpose(1, 2).reshape(B, S, -1))

    def _projected(self, x_BSD: Tensor) -> tuple[Tensor, ...]:
        """Return queries, keys and values, each [B, S, its heads * h]."""
        if self.fused:
            return tuple(part.contiguous() for part in self.qkv_proj(x_BSD).split(self.parts, -1))
        return self.q_proj(x_BSD), self.k_proj(x_BSD), self.v_proj(x_BSD)


class MLP(nn.Module):
    """Gated unit (arXiv:2002.05202).

    Attributes:
        barrier: on TPUs, applied to the last projection's input and to the gradients of what it is
            made of. All of them are factors of matrix products (barriers.py).
    """

    barrier: Barrier | None = None

    def __init__(self, a: Architecture) -> None:
        super().__init__()
        D, ffn = a.hidden_size, a.intermediate_size
        if a.fused_mlp:
            self.gate_up_proj = nn.Linear(D, 2 * ffn, bias=a.mlp_bias)
        else:
            self.gate_proj = nn.Linear(D, ffn, bias=a.mlp_bias)
            self.up_proj = nn.Linear(D, ffn, bias=a.mlp_bias)
        self.fused = a.fused_mlp
        self.down_proj = nn.Linear(ffn, D, bias=a.mlp_bias)
        self.activation = ACTIVATIONS[a.activation]

    def forward(self, x_BSD: Tensor) -> Tensor:
        made: Sequence[Tensor]
        if self.fused:
            made = [self.gate_up_proj(x_BSD)]
        else:
            made = [self.gate_proj(x_BSD), self.up_proj(x_BSD)]
        if self.barrier is not None:
            made = gradients_stored(self.barrier, *made)
        gate, up = made[0].chunk(2, dim=-1) if self.fused else made
        product = self.activation(gate) * up
        return self.down_proj(product if self.barrier is None else stored(self.barrier, product))


def put_barriers(model: nn.Module, barrier: Barrier) -> None:
    """Give every gated unit a barrier."""
    for module in model.modules():
        if isinstance(module, MLP):
            module.barrier = barrier


class DecoderLayer(nn.Module):
    """A layer: x + norm(attention(norm(x))), then x + norm(mlp(norm(x))), of which a family has the
    norms before, those after, or both. Pure: reads only its arguments and weights."""

    def __init__(self, a: Architecture, kind: LayerKind) -> None:
        super().__init__()
        self.self_attn = Attention(a, kind)
        self.mlp = MLP(a)
        self.norm_names = NORM_NAMES[a.norms]
        for name in self.norm_names:
            if name is not None:
                self.add_module(name, RMSNorm(a.hidden_size, a.rms_norm_eps, a.norm))
        self.residual_scale = a.residual_scale

    def forward(self, x_BSD: Tensor, context: LayerContext) -> Tensor:
        mixed = self.self_attn(self._norm(0, x_BSD), context)
        x_BSD = x_BSD + self._scaled(self._norm(1, mixed))
        return x_BSD + self._scaled(self._norm(3, self.mlp(self._norm(2, x_BSD))))

    def _norm(self, place: int, x_BSD: Tensor) -> Tensor:
        name = self.norm_names[place]
        return x_BSD if name is None else getattr(self, name)(x_BSD)

    def _scaled(self, x_BSD: Tensor) -> Tensor:
        return x_BSD if self.residual_scale == 1 else x_BSD * self.residual_scale


class LayerStack(nn.ModuleList):
    """A container that only chains the layers, so that a pass may chain them in another way."""

    def forward(self, x_BSD: Tensor, context: LayerContext) -> Tensor:
        for layer in self:
            x_BSD = layer(x_BSD, context)
        return x_BSD

    def templates(self) -> list[nn.Module]:
        """Return the layers whose code is executed."""
        return list(self)

    def with_cache(
        self, x_BSD: Tensor, context: LayerContext, cache: Any
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Run `forward` while the cores of generation/cache.py are installed. Each layer reads its
        part of the cache (if it is not None), and its new keys and values are returned too."""
        keys, values = [], []
        for index, layer in enumerate(self):
            old = None if cache is None else (cache.keys[index], cache.values[index])
            x_BSD, (key, value) = with_cache(layer, x_BSD, context, old)
            keys.append(key)
            values.append(value)
        return x_BSD, keys, values


def with_cache(
    layer: nn.Module, x_BSD: Tensor, context: LayerContext, cache: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Run a layer while a core of generation/cache.py is installed; return its output and its new
    keys and values.

    Args:
        cache: the layer's keys and values; None during prefill.
    """
    core: Any = layer.get_submodule("self_attn.core")
    core.cache = cache
    x_BSD = layer(x_BSD, context)
    return x_BSD, core.new


class Decoder(nn.Module):
    """Embedding, layers, norm: the part that Hugging Face calls `model` inside the causal LM."""

    def __init__(self, a: Architecture) -> None:
        super().__init__()
        self.architecture = a
        shape, scale = (a.vocab_size, a.hidden_size), a.embedding_scale
        self.embed_tokens = (
            nn.Embedding(*shape) if scale is None else ScaledEmbedding(*shape, scale)
        )
        self.layers: nn.Module = LayerStack(DecoderLayer(a, kind) for kind in a.layers)
        self.norm = RMSNorm(a.hidden_size, a.rms_norm_eps, a.norm)
        # Attention cores differ only by window; each prepares its mask once per forward.
        self.preparers: list[Any] = [
            core_for(a, window, ReferenceAttention) for window in a.windows
        ]
        self.rotary = nn.ModuleList(RotaryTables(rope, a.head_dim) for rope in a.ropes)
        if (growth := a.rope.query_growth) is not None:
            self.rotary.append(RotaryTables(a.rope, a.head_dim, growth))

    def tables(
        self, position_ids: Tensor, length: int, dtype: torch.dtype
    ) -> tuple[tuple[Tensor, Tensor], ...]:
        """Return each rope's cosines and sines for positions [B, S] in sequences of a length; then
        those of queries, if these are scaled by their position."""
        dtype = torch.float32 if self.architecture.wide_rotation else dtype
        return tuple(make(position_ids, length, dtype) for make in self.rotary)

    def finish(self, x_BSD: Tensor) -> Tensor:
        """Return the last layer's hidden states after the final norm, divided by the logits'
        divisor: their product with the output weight is the logits, wherever it is taken."""
        x_BSD, divisor = self.norm(x_BSD), self.architecture.logits_divisor
        return x_BSD if divisor == 1 else x_BSD / divisor

    def forward(self, input_ids: Tensor, position_ids: Tensor, segment_ids: Tensor) -> Tensor:
        x_BSD = self.embed_tokens(input_ids)
        prepared = tuple(core.prepare(segment_ids) for core in self.preparers)
        length = position_ids.shape[1]
        context = LayerContext(self.tables(position_ids, length, x_BSD.dtype), prepared)
        return self.finish(self.layers(x_BSD, context))


class OutputProjection(NamedTuple):
    """The map from hidden states to logits: the matrix [V, D], and the logits' soft-cap."""

    weight: Tensor
    softcap: float | None


class CausalLM(nn.Module):
    """The decoder with its output projection, tied to the embedding or its own."""

    def __init__(self, a: Architecture) -> None:
        super().__init__()
        self.architecture = a
        self.model = Decoder(a)
        # Tied models have no lm_head of their own: one tensor, one name, one gradient.
        self.lm_head = (
            None if a.tie_word_embeddings else nn.Linear(a.hidden_size, a.vocab_size, bias=False)
        )

    @property
    def output(self) -> OutputProjection:
        """The output projection."""
        return OutputProjection(self.output_weight, self.architecture.final_softcap)

    @property
    def output_weight(self) -> Tensor:
        """The matrix [V, D] that maps hidden states to logits."""
        return self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    def forward(self, input_ids: Tensor, position_ids: Tensor, segment_ids: Tensor) -> Tensor:
        """Return hidden states [B, S, D] after the final norm, for integers [B, S] each."""
        return self.model(input_ids, position_ids, segment_ids)

    def logits(self, input_ids: Tensor, position_ids: Tensor, segment_ids: Tensor) -> Tensor:
        """Return logits [B, S, V] in fp32; for checks and generation, never in training."""
        return self.logits_of(self(input_ids, position_ids, segment_ids))

    def logits_of(self, hidden: Tensor) -> Tensor:
        """Return logits [..., V] in fp32 for hidden states [..., D] after the final norm."""
        products = F.linear(hidden, self.output_weight).float()
        return softcapped(products, self.architecture.final_softcap)


def module_names(model: CausalLM) -> list[str]:
    """Return the names of the model's modules, and of those that other families have instead."""
    elsewhere = {*NAMED_OUTPUTS.values(), *FUSED_OUTPUTS.values()}
    names = [name for name, _ in model.named_modules()]
    return [*names, *(f"model.layers.0.{name}" for name in sorted(elsewhere))]


def replace_attention_cores(model: CausalLM, make_core: MakeCore) -> None:
    """Inject an attention kernel: what `make_core` makes replaces every reference core."""
    decoder: Any = model.model
    a = model.architecture
    decoder.preparers = [core_for(a, window, make_core) for window in a.windows]
    for layer in decoder.layers:
        attention = layer.self_attn
        attention.core = core_for(a, a.windows[attention.kind], make_core)


def initial_tensor(
    name: str, shape: torch.Size, std: float, seed: int, *, norm: str = "llama"
) -> Tensor:
    """Return a random weight for training from scratch, fp32 on the CPU.

    The rule is Hugging Face's for these families: matrices and embeddings are normal(0, std),
    biases 0, norms 1, or 0 if they add one (`norm`). Each tensor has its own generator, keyed by
    seed and name, so that the weights do not depend on the order in which they are made nor on the
    device or mesh.
    """
    if "norm" in name:
        return torch.zeros(shape) if norm == "plus_one" else torch.ones(shape)
    if name.endswith("bias"):
        return torch.zeros(shape)
    return torch.empty(shape).normal_(0.0, std, generator=generator_for(seed, name))


def generator_for(seed: int, name: str) -> torch.Generator:
    """Return a generator on the CPU for one tensor's values.

    Both are hashed together into 32 bits, since the generator reads no more of its seed.
    """
    return torch.Generator().manual_seed(hash_name(f"{seed} {name}"))


def hash_name(name: str) -> int:
    """Return a stable 32-bit hash of a parameter's name (FNV-1a), equal in every process."""
    value = 0x811C9DC5
    for byte in name.encode():
        value = ((value ^ byte) * 0x01000193) % 2**32
    return value
