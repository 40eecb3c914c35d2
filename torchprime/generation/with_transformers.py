"""Greedy answers of a Hugging Face folder, by transformers on the CPU.

They show a base and its fine-tuned model side by side, and are used to count exact matches. No
trainer code takes part, so the answers are those that a user of the export gets.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import GenerationConfig

from torchprime.checkpoint.adapter.load import load_model
from torchprime.errors import DataError

ROWS_AT_ONCE = 32


def generation_samples(
    folder: Path, prompts: list[list[int]], eos_ids: Sequence[int], max_new_tokens: int
) -> list[list[int]]:
    """Continue each prompt with the most likely token until a stop token or the limit.

    Args:
        folder: a Hugging Face folder with weights, or a PEFT folder.
        prompts: token ids, of any lengths.
        eos_ids: where to stop.
        max_new_tokens: the limit of new tokens.

    Returns:
        The new tokens of each prompt. The last one is the stop token where one was given, so that a
        caller can tell an answer that ended from one that was cut off.
    """
    empty = [index for index, prompt in enumerate(prompts) if not prompt]
    if empty:
        raise DataError(f"Prompts {empty} are empty; a prompt needs at least one token.")
    stops = list(eos_ids)
    model = load_model(folder)
    model.generation_config = generation_settings(stops, max_new_tokens)
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    answers: dict[int, list[int]] = {}
    for start in range(0, len(order), ROWS_AT_ONCE):
        rows = order[start : start + ROWS_AT_ONCE]
        ids, mask = _left_padded([prompts[index] for index in rows])
        with torch.no_grad():
            output = model.generate(input_ids=ids, attention_mask=mask)
        for index, tokens in zip(rows, output[:, ids.shape[1] :].tolist(), strict=True):
            answers[index] = _until_stop(tokens, stops)
    return [answers[index] for index in range(len(prompts))]


def generation_settings(
    stops: Sequence[int], max_new_tokens: int, temperature: float = 0.0
) -> GenerationConfig:
    """Return settings for greedy decoding, or sampling from the full distribution, and nothing
    else.

    The folder's own settings (sampling, repetition penalty) would replace unset ones: assign the
    result to the model's generation_config.
    """
    sampled = {"temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {}
    return GenerationConfig(
        do_sample=bool(temperature),
        num_beams=1,
        max_new_tokens=max_new_tokens,
        eos_token_id=list(stops) or None,
        pad_token_id=stops[0] if stops else 0,
        **sampled,
    )


def _left_padded(prompts: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and mask [B, S], real tokens at the right end, where generation continues."""
    length = max(len(prompt) for prompt in prompts)
    ids = torch.zeros(len(prompts), length, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, length - len(prompt) :] = torch.tensor(prompt)
        mask[row, length - len(prompt) :] = 1
    return ids, mask


def _until_stop(tokens: list[int], stops: list[int]) -> list[int]:
    """Cut the padding of a finished row after its stop token."""
    ends = [place for place, token in enumerate(tokens) if token in stops]
    return tokens[: ends[0] + 1] if ends else tokens
