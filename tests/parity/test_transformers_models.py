"""Our decoder against transformers': logits and every gradient, on unpadded, padded, packed
batches.

Reference: transformers' own classes in eager attention, given an explicit mask written here in
plain Python from the definition (same segment, not later, within the window), and plain
cross-entropy.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_llama import SHAPE
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    Glm4Config,
    GraniteConfig,
    LlamaConfig,
    Ministral3Config,
    MinistralConfig,
    MistralConfig,
    Olmo2Config,
    Olmo3Config,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

from torchprime.losses.chunks import Projection
from torchprime.losses.cross_entropy import chunked_cross_entropy
from torchprime.models.architecture import architecture_from_hf
from torchprime.models.attention import ReferenceAttention
from torchprime.models.decoder import CausalLM

V, S = 61, 20
# Without a padding token: transformers leaves that token's row without a gradient, also in text.
SMALL: dict[str, Any] = dict(SHAPE, vocab_size=V, num_hidden_layers=3, pad_token_id=None)
DEEP: dict[str, Any] = SMALL | {"num_hidden_layers": 4}
LLAMA3_ROPE: dict[str, Any] = dict(
    rope_type="llama3",
    rope_theta=5e5,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=16,
)
PHI_IDS: dict[str, Any] = dict(bos_token_id=0, eos_token_id=1, pad_token_id=None)
PHI_LONG: dict[str, Any] = dict(
    partial_rotary_factor=0.75,
    # Below the longest row of every batch here, by which transformers chooses the factors.
    original_max_position_embeddings=10,
    rope_scaling=dict(type="longrope", short_factor=[1.0, 1.1, 1.2], long_factor=[1.0, 1.5, 2.0]),
)
GRANITE: dict[str, Any] = dict(
    embedding_multiplier=6.0,
    attention_multiplier=0.3,
    residual_multiplier=0.4,
    logits_scaling=3.0,
)
GEMMA2: dict[str, Any] = dict(
    head_dim=16,
    query_pre_attn_scalar=24,
    attn_logit_softcapping=0.8,
    final_logit_softcapping=3.0,
)
UNCAPPED: dict[str, Any] = dict(attn_logit_softcapping=None, final_logit_softcapping=None)
MINISTRAL3: dict[str, Any] = dict(
    type="yarn",
    rope_theta=1e4,
    factor=4.0,
    original_max_position_embeddings=5,
    mscale=1.0,
    mscale_all_dim=1.0,
    llama_4_scaling_beta=0.4,
)
GLM: dict[str, Any] = dict(head_dim=16, partial_rotary_factor=0.5)
CONFIGS = {
    "llama2": LlamaConfig(**SMALL),
    "llama3.1": LlamaConfig(**SMALL, rope_parameters=LLAMA3_ROPE),
    "llama3.2-tied": LlamaConfig(**SMALL, rope_parameters=LLAMA3_ROPE, tie_word_embeddings=True),
    "llama-linear-rope": LlamaConfig(
        **SMALL, rope_parameters=dict(rope_type="linear", rope_theta=1e4, factor=2.0)
    ),
    "llama-biases": LlamaConfig(**SMALL, attention_bias=True, mlp_bias=True),
    "qwen2": Qwen2Config(**SMALL),
    "qwen2-window": Qwen2Config(
        **SMALL, use_sliding_window=True, sliding_window=5, max_window_layers=1
    ),
    "qwen2-layer-types": Qwen2Config(
        **SMALL,
        use_sliding_window=True,
        sliding_window=5,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "qwen3": Qwen3Config(**SMALL, head_dim=16),
    "mistral": MistralConfig(**SMALL, sliding_window=6),
    "llama-yarn": LlamaConfig(
        **SMALL,
        rope_parameters=dict(
            rope_type="yarn", rope_theta=1e4, factor=4.0, original_max_position_embeddings=16
        ),
    ),
    # Positions beyond the original context, where queries are scaled.
    "ministral3": Ministral3Config(**SMALL, head_dim=16, rope_parameters=MINISTRAL3),
    "ministral": MinistralConfig(
        **SMALL,
        head_dim=16,
        sliding_window=5,
        layer_types=["full_attention", "sliding_attention", "sliding_attention"],
    ),
    "glm4": Glm4Config(**SMALL, **GLM),
    "granite": GraniteConfig(**SMALL, **GRANITE),
    "smollm3": SmolLM3Config(**SMALL, no_rope_layers=[1, 0, 1]),
    "smollm3-window": SmolLM3Config(
        **SMALL,
        no_rope_layer_interval=2,
        use_sliding_window=True,
        sliding_window=5,
        # No biases of keys: without rotation their gradient is zero, and its rounding is compared.
        mlp_bias=True,
        tie_word_embeddings=False,
    ),
    "phi3-window": Phi3Config(**SMALL | PHI_IDS, sliding_window=6),
    "phi4-mini-short": Phi3Config(
        **{**SMALL | PHI_IDS, **PHI_LONG, "original_max_position_embeddings": S}
    ),
    "phi4-mini": Phi3Config(
        **SMALL | PHI_IDS, tie_word_embeddings=True, max_position_embeddings=64, **PHI_LONG
    ),
    # Caps that bend scores and logits: most are above 1, and half of the logits above 3.
    "gemma2": Gemma2Config(**DEEP, **GEMMA2, sliding_window=5, attention_bias=True),
    "gemma2-untied-uncapped": Gemma2Config(
        **DEEP,
        **GEMMA2 | UNCAPPED,
        tie_word_embeddings=False,
    ),
    "gemma3": Gemma3TextConfig(
        **DEEP,
        head_dim=16,
        sliding_window=5,
        query_pre_attn_scalar=24,
        layer_types=["sliding_attention"] * 2 + ["full_attention", "sliding_attention"],
        rope_parameters={
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        },
    ),
    "olmo2": Olmo2Config(**SMALL),
    "olmo3": Olmo3Config(
        **SMALL,
        sliding_window=5,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"],
        rope_parameters={
            "full_attention": dict(
                rope_type="yarn",
                rope_theta=5e5,
                factor=4.0,
                original_max_position_embeddings=16,
            ),
            "sliding_attention": {"rope_type": "default", "rope_theta": 5e5},
        },
    ),
}
# Segments of each block; 0 is padding.
BATCHES = {
    "unpadded": [[1] * S, [1] * S],
    "padded": [[1] * 13 + [0] * 7, [1] * 19 + [0]],
    "packed": [[1] * 4 + [2] * 9 + [3] * 7, [1] * 11 + [2] * 6 + [0] * 3],
}


def _batch(kind: str):
    segments = torch.tensor(BATCHES[kind])
    g = torch.Generator().manual_seed(3)
    ids = torch.randint(0, V, segments.shape, generator=g)
    positions = torch.zeros_like(ids)
    targets = torch.full_like(ids, -100)
    for b in range(len(segments)):
        for i in range(S):
            if i and segments[b, i] == segments[b, i - 1]:
                positions[b, i] = positions[b, i - 1] + 1
                if segments[b, i] and i % 3:
                    targets[b, i - 1] = ids[b, i]
    return ids, positions, segments, targets


def _mask(segments: torch.Tensor, window: int | None) -> torch.Tensor:
    mask = torch.full((len(segments), 1, S, S), torch.finfo(torch.float32).min)
    for b, row in enumerate(segments.tolist()):
        for q in range(S):
            for k in range(q + 1):
                if row[q] == row[k] and (window is None or q - k < window):
                    mask[b, 0, q, k] = 0.0
    return mask


def _reference(config, ids, positions, segments):
    """transformers' model and its logits; layers with a window get the windowed mask."""
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            # Gemma adds one to them.
            low = -0.5 if config.model_type.startswith("gemma") else 0.5
            parameter.data.uniform_(low, low + 1.0)
        else:
            parameter.data.normal_(0.0, 0.15)
    types = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    if config.model_type in ("mistral", "phi3"):
        mask = _mask(segments, window)
    elif types and "sliding_attention" in types:
        mask = {
            "full_attention": _mask(segments, None),
            "sliding_attention": _mask(segments, window),
        }
    else:
        mask = _mask(segments, None)
    logits = model(input_ids=ids, position_ids=positions, attention_mask=mask).logits
    return model, logits


@pytest.mark.parametrize("kind", BATCHES)
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_and_gradients(name: str, kind: str) -> None:
    compare(CONFIGS[name], kind)


# The context is shorter than the block. transformers goes by the largest position and we by the
# block's length, so only whole rows have the same rope.
SHORT: dict[str, Any] = dict(SMALL, max_position_embeddings=16)
BY_LENGTH = {
    "dynamic": LlamaConfig(
        **SHORT, rope_parameters=dict(rope_type="dynamic", rope_theta=1e4, factor=2.0)
    ),
    "longrope": Qwen3Config(
        **SHORT,
        head_dim=16,
        rope_parameters=dict(
            rope_type="longrope",
            rope_theta=1e4,
            factor=2.0,
            original_max_position_embeddings=8,
            short_factor=[1.0 + i / 8 for i in range(8)],
            long_factor=[1.0 + i for i in range(8)],
        ),
    ),
}


@pytest.mark.parametrize("name", BY_LENGTH)
def test_ropes_that_depend_on_the_length(name: str) -> None:
    compare(BY_LENGTH[name], "unpadded")


def compare(config: Any, kind: str) -> None:
    """Compare logits, loss and gradients of a model with transformers'."""
    ids, positions, segments, targets = _batch(kind)
    reference, logits = _reference(config, ids, positions, segments)
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    loss.backward()

    ours = CausalLM(architecture_from_hf(config.to_dict()))
    names = dict(ours.named_parameters())
    assert set(names) == {n for n, _ in reference.named_parameters()}
    ours.load_state_dict({n: p.detach() for n, p in reference.named_parameters()})
    real = segments > 0
    our_logits = ours.logits(ids, positions, segments)
    _close(our_logits[real], logits[real], "logits")
    hidden = ours(ids, positions, segments)
    weights = torch.ones_like(targets, dtype=torch.float32)
    sums = chunked_cross_entropy(hidden, Projection(*ours.output), targets, weights, 3)
    our_loss, count = sums.loss_sum, sums.weight_sum
    assert count == (targets >= 0).sum()
    _close(our_loss, loss, "loss")
    our_loss.backward()
    for n, p in reference.named_parameters():
        our_grad, grad = names[n].grad, p.grad
        assert our_grad is not None and grad is not None, n
        _close(our_grad, grad, n)


def _close(ours: torch.Tensor, theirs: torch.Tensor, what: str) -> None:
    error = (ours - theirs).abs().max() / theirs.abs().max()
    assert error < 1e-5, f"{what}: {error:.1e}"


@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize("length", [300, 512])
def test_groups_of_rows_leave_attention_as_it_is(length: int, window: int | None) -> None:
    """Long enough for several groups of query rows, against one softmax over everything."""
    g = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, length, 8, generator=g, dtype=torch.float64)
    k, v = (torch.randn(2, 2, length, 8, generator=g, dtype=torch.float64) for _ in range(2))
    segments = (torch.arange(length) // 111).expand(2, -1)
    core = ReferenceAttention(8, window)
    ours = core(q, k, v, core.prepare(segments))
    place = torch.arange(length)
    seen = (place[:, None] >= place) & (segments[0][:, None] == segments[0])
    if window is not None:
        seen &= place[:, None] - place < window
    theirs = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)
    # Scores go through fp32, so agreement is to fp32.
    torch.testing.assert_close(ours.float(), theirs.float(), rtol=1e-5, atol=1e-5)


def test_a_neighbouring_segment_changes_nothing() -> None:
    """Exactly nothing: masked scores underflow to zero."""
    ids, positions, segments, _ = _batch("packed")
    torch.manual_seed(1)
    model = CausalLM(architecture_from_hf(CONFIGS["qwen3"].to_dict()))
    before = model(ids, positions, segments)
    changed = ids.clone()
    changed[0, 4:13] = (changed[0, 4:13] + 1) % V  # the middle segment of block 0
    after = model(changed, positions, segments)
    moved = (before != after).any(-1)
    assert moved[0, 4:13].all()
    assert not moved[0, :4].any() and not moved[0, 13:].any() and not moved[1].any()
