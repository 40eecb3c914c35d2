"""Greedy answers equal a hand-written argmax loop, whatever the folder's own sampling settings."""

from __future__ import annotations

import json

import pytest
import torch
import transformers

from torchprime.errors import DataError
from torchprime.generation import with_transformers as greedy
from torchprime.generation.with_transformers import generation_samples

PROMPTS = [[5], [9, 8, 7, 6, 5, 4, 3], [40, 41, 42], [100, 2]]


def by_hand(folder, prompt, stops, limit):
    """One prompt alone, no cache, no padding."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(limit):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] in stops:
                break
    return ids[len(prompt) :]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(7)
    config = transformers.LlamaConfig(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
    )
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():  # logits far enough apart to have one largest
            parameter.add_(torch.randn_like(parameter) * 0.1)
    out = tmp_path_factory.mktemp("model")
    model.save_pretrained(out)
    settings = {"do_sample": True, "temperature": 9.0, "repetition_penalty": 5.0, "num_beams": 2}
    (out / "generation_config.json").write_text(json.dumps(settings))
    return out


@pytest.mark.parametrize("rows_at_once", [2, 32])
def test_equals_argmax_by_hand_in_the_order_given(folder, monkeypatch, rows_at_once):
    monkeypatch.setattr(greedy, "ROWS_AT_ONCE", rows_at_once)
    free = [by_hand(folder, prompt, [], 8) for prompt in PROMPTS]
    stops = [free[1][3], 0]  # so that one answer ends early while others go on
    expected = [by_hand(folder, prompt, stops, 8) for prompt in PROMPTS]
    assert len({len(answer) for answer in expected}) > 1
    assert generation_samples(folder, PROMPTS, stops, 8) == expected


def test_stop_token_ends_the_answer_and_is_part_of_it(folder):
    first = generation_samples(folder, [[5]], [], 1)[0][0]
    assert generation_samples(folder, [[5]], [first], 8) == [[first]]


def test_no_prompts_and_empty_prompts(folder):
    assert generation_samples(folder, [], [0], 4) == []
    with pytest.raises(DataError, match=r"Prompts \[1\] are empty"):
        generation_samples(folder, [[1], []], [0], 4)
