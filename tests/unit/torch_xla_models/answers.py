"""Answers of transformers, one prompt after the other: no padding, no batch, no torchprime."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Olmo3Config,
    Phi3Config,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from torchprime.generation.decode import Answer, GenerateOptions

V = 96
SHAPE: dict[str, Any] = dict(
    vocab_size=V,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)
PHI: dict[str, Any] = {
    "sliding_window": 12,
    "partial_rotary_factor": 0.5,
    "pad_token_id": None,
    "eos_token_id": 2,
}
GRANITE: dict[str, Any] = {
    **{"embedding_multiplier": 3.0, "attention_multiplier": 0.3, "residual_multiplier": 0.4},
    "logits_scaling": 0.1,
}
DEEP: dict[str, Any] = SHAPE | {"num_hidden_layers": 5}
MIXED = ["sliding_attention", "full_attention"]
CONFIGS = {
    "llama-tied": LlamaConfig(**SHAPE, tie_word_embeddings=True),
    # The first layer sees everything, the second a window; biases.
    "qwen2": Qwen2Config(**SHAPE, use_sliding_window=True, sliding_window=20, max_window_layers=1),
    # Layers that alternate, and one more than two rounds.
    "qwen3": Qwen3Config(
        **DEEP,
        head_dim=16,
        use_sliding_window=True,
        sliding_window=12,
        layer_types=(MIXED * 3)[:5],
    ),
    "gemma2": Gemma2Config(
        **DEEP,
        head_dim=16,
        query_pre_attn_scalar=24,
        sliding_window=12,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=4.0,
    ),
    "gemma3": Gemma3TextConfig(
        **DEEP,
        head_dim=16,
        query_pre_attn_scalar=24,
        sliding_window=12,
        layer_types=(MIXED * 3)[:5],
        rope_parameters={
            "full_attention": {"rope_type": "default", "rope_theta": 1e4},
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        },
    ),
    "olmo3": Olmo3Config(**SHAPE, sliding_window=12, layer_types=MIXED),
    "mistral": MistralConfig(**SHAPE, sliding_window=12),
    "granite": GraniteConfig(**SHAPE | GRANITE),
    "phi3": Phi3Config(**SHAPE | PHI),
}
LIMIT, NEW = 160, 40
# Batches of 4 and 3 in the buckets 64 and 160; the longest leaves less room than NEW.
LENGTHS = (100, 3, 64, 150, 1, 17, 130)


def prompts(lengths: tuple[int, ...] = LENGTHS, seed: int = 0) -> list[list[int]]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(0, V, (length,), generator=g).tolist() for length in lengths]


def options(**changes) -> GenerateOptions:
    given: dict[str, Any] = dict(max_new_tokens=NEW, stop_ids=(), max_length=LIMIT, batch_size=4)
    return GenerateOptions(**(given | changes))


def make_model(name: str) -> PreTrainedModel:
    """Weights large enough for answers that wander."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(CONFIGS[name], attn_implementation="eager").eval()
    for key, parameter in model.named_parameters():
        if "norm" in key:
            low = -0.5 if name.startswith("gemma") else 0.5  # Gemma adds one
            parameter.data.uniform_(low, low + 1.0)
        else:
            parameter.data.normal_(0.0, 0.3)
    return model


def expected(
    model: PreTrainedModel, asked: list[list[int]], given: GenerateOptions
) -> list[Answer]:
    """transformers' greedy answers."""
    found = []
    for prompt in asked:
        out = model.generate(  # pyright: ignore[reportCallIssue]
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=min(given.max_new_tokens, given.max_length - len(prompt)),
            do_sample=False,
            eos_token_id=list(given.stop_ids) or None,
            pad_token_id=0,
        )
        ids = out[0, len(prompt) :].tolist()
        stopped = ids[-1] in given.stop_ids
        found.append(Answer(ids[:-1] if stopped else ids, stopped))
    return found


def cut(free: list[Answer], stops: tuple[int, ...]) -> list[Answer]:
    """Greedy answers that did not stop, up to the first of these tokens."""
    ends = [next((i for i, t in enumerate(a.ids) if t in stops), None) for a in free]
    return [
        Answer(a.ids if end is None else a.ids[:end], end is not None)
        for a, end in zip(free, ends, strict=True)
    ]


def some_stops(free: list[Answer]) -> tuple[int, ...]:
    """Two tokens of them, with which answers end at different times, and one that none makes."""
    return free[0].ids[7], free[2].ids[20], V - 1
