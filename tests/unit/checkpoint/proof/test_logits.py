"""Logits of the fixed prompts, against transformers' model on the same weights."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from torchprime.checkpoint.proof import logits as module
from torchprime.checkpoint.proof.logits import (
    PROMPT_TOKENS,
    PROMPTS,
    decoder_logits,
    encode_prompts,
    likeliest,
    no_room,
)

CONFIG: dict[str, Any] = {
    **{"model_type": "llama", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 50, "hidden_act": "silu"},
    **{"rms_norm_eps": 1e-5, "rope_theta": 1e4, "max_position_embeddings": 64},
    **{"tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False},
}


def test_our_decoder_computes_what_transformers_does() -> None:
    torch.manual_seed(3)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**CONFIG)).eval()
    ids = np.random.default_rng(0).integers(0, 50, (3, 12))
    with torch.no_grad():
        expected = model(torch.as_tensor(ids)).logits.numpy()
    weights = model.state_dict()
    found = decoder_logits(CONFIG, weights.__getitem__, torch.float32, ids)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_prompts_are_cut_to_the_shortest(by_hand: SimpleNamespace, tmp_path: Path) -> None:
    folder = by_hand.save(by_hand.byte_level(("<s>",)), tmp_path / "t", {})
    found = encode_prompts(folder / "tokenizer.json", ["abcdef", "abc", "bcdefg"])
    vocab = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    assert found.tolist() == [[vocab[c] for c in text] for text in ("abc", "abc", "bcd")]
    assert encode_prompts(folder / "tokenizer.json").shape == (len(PROMPTS), PROMPT_TOKENS)
    assert encode_prompts(folder / "tokenizer.json", longest=5).shape == (len(PROMPTS), 5)


def test_the_likeliest_tokens_in_the_certificates_form() -> None:
    logits = np.zeros(20, np.float32)
    logits[[7, 3, 12]] = [2.5, 1 / 3, -1.0]
    found = likeliest(logits)
    assert list(found.items())[:2] == [("7", 2.5), ("3", 0.3333333)]
    # Of equal ones the first ids, and the smallest value not at all.
    assert list(found)[2:] == ["0", "1", "2", "4", "5", "6"]


@pytest.mark.parametrize(("free", "fits"), [(8_000_000_000, True), (7_999_999_999, False)])
def test_transformers_needs_the_model_twice(
    monkeypatch: pytest.MonkeyPatch, free: int, fits: bool
) -> None:
    monkeypatch.setattr(module, "available_memory", lambda: free)
    told = no_room(1_000_000_000, torch.float32)
    assert (told == "") == fits
    assert fits or "needs about 8.0 GB of host memory, 8.0 GB are free" in told
    assert no_room(2_000_000_000, torch.bfloat16) == told
