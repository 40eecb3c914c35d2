"""Attention scores over the cache, compared with a sum in float64; decoding token by token,
compared with one forward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from torchprime.generation.cache import (
    Cache,
    Prompts,
    by_product,
    by_sums,
    cached_attention,
    next_hidden,
    next_rotary,
    read_prompts,
)
from torchprime.models.architecture import architecture_from_hf
from torchprime.models.decoder import CausalLM, initial_tensor

GEMMA2 = {
    **{"model_type": "gemma2", "vocab_size": 31, "hidden_size": 16, "intermediate_size": 24},
    **{"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8},
    **{"query_pre_attn_scalar": 12, "sliding_window": 4, "max_position_embeddings": 64},
    **{"attn_logit_softcapping": 0.5, "final_logit_softcapping": 1.5},
}


@pytest.mark.parametrize("head_dim", [16, 32, 40, 96])  # summed at once, and in stages of 32
@pytest.mark.parametrize("match", [by_product, by_sums])
def test_scores(match: Callable[[Tensor, Tensor], Tensor], head_dim: int) -> None:
    g = torch.Generator().manual_seed(head_dim)
    q = torch.randn(2, 3, 4, head_dim, generator=g)
    keys = torch.randn(2, 3, 7, head_dim, generator=g)
    expected = torch.einsum("bkgh,bkch->bkgc", q.double(), keys.double())
    torch.testing.assert_close(match(q, keys).double(), expected, rtol=0, atol=1e-5)


def test_sums_of_bf16_are_rounded_once() -> None:
    """512 and many small numbers: in bf16 each would be lost."""
    q, keys = torch.ones(1, 1, 1, 64).bfloat16(), torch.full((1, 1, 1, 64), 0.5).bfloat16()
    keys[..., 0] = 512
    assert by_sums(q, keys).item() == 512 + 63 * 0.5


# Prompts end inside of the original context, answers two contexts later.
MINISTRAL3 = {
    **{k: v for k, v in GEMMA2.items() if "soft" not in k and "scalar" not in k},
    **{"model_type": "ministral3", "sliding_window": None},
    "rope_parameters": {
        **{"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0},
        **{"original_max_position_embeddings": 5, "llama_4_scaling_beta": 0.4},
    },
}


@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("ahead", [False, True], ids=["", "cosines ahead"])
@pytest.mark.parametrize(
    ("config", "match"), [(GEMMA2, by_product), (GEMMA2, by_sums), (MINISTRAL3, by_product)]
)
def test_tokens_one_by_one_have_the_logits_of_one_forward(
    config: dict[str, Any], match: Callable[[Tensor, Tensor], Tensor], ahead: bool, paired: bool
) -> None:
    """Two prompts of 4 and 7 tokens, in two rows or in one; windows that end inside the answers,
    and soft-caps."""
    model = CausalLM(architecture_from_hf(config))
    for name, weight in model.named_parameters():
        weight.data = initial_tensor(name, weight.shape, 0.4, seed=1, norm=model.architecture.norm)
    rng = torch.Generator().manual_seed(0)
    texts = [torch.randint(1, 31, (n + 5,), generator=rng) for n in (4, 7)]
    slots, of_prompt = 16, 8
    spans = torch.tensor([[0, 4] if paired else [4, 4], [1, 7]], dtype=torch.int32)
    prompts = Prompts(spans, of_prompt)
    ids = torch.zeros((1, 13) if paired else (2, of_prompt), dtype=torch.long)
    ids[0, 0:4] = texts[0][:4]
    if not paired:
        ids[0] = torch.cat([torch.zeros(4), texts[0][:4]])
    ids[-1, -7:] = texts[1][:7]
    with torch.no_grad(), cached_attention(model, match=match):
        hidden, cache = read_prompts(model, ids, prompts, slots)
        found = [model.logits_of(hidden)]
        room = [(*t.shape[:2], slots - of_prompt, t.shape[3]) for t in cache.keys]
        keys, values = (
            [torch.cat([t, torch.zeros(r)], 2) for t, r in zip(part, room, strict=True)]
            for part in cache
        )
        widened = Cache(tuple(keys), tuple(values))
        later = next_rotary(model, prompts, torch.tensor(of_prompt), 5, widened)
        for number in range(5):
            old = Cache(tuple(keys), tuple(values))
            rotary = tuple((cos[number], sin[number]) for cos, sin in later) if ahead else ()
            slot = torch.tensor(of_prompt + number)
            token = torch.stack([texts[0][4 + number], texts[1][7 + number]])
            hidden, new = next_hidden(model, token, prompts, slot, old, rotary)
            for kept, added in zip((*keys, *values), (*new.keys, *new.values), strict=True):
                kept[:, :, slot] = added[:, :, 0]
            found.append(model.logits_of(hidden))
    for row, (text, count) in enumerate(zip(texts, (4, 7), strict=True)):
        alone = text[None]
        with torch.no_grad():
            whole = model.logits(alone, torch.arange(alone.shape[1])[None], torch.ones_like(alone))
        wanted = whole[0, count - 1 :]
        assert wanted.abs().max() < config.get("final_logit_softcapping", 1e3)
        torch.testing.assert_close(torch.stack(found)[:, row], wanted, rtol=1e-5, atol=1e-5)
