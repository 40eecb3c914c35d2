"""Logits of fixed prompts, which two programs must agree on if they compute the same model.

The prompts are fixed texts and no training rows, because the certificate contains them and is
published with the weights. They are cut to one length, long enough to detect a wrong rope. The
trainer's logits are compared with transformers in full; the certificate stores the most likely
tokens after each prompt, so that the comparison can be repeated without the trainer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from torchprime.host_memory import available_memory
from torchprime.models.architecture import Architecture, architecture_from_hf
from torchprime.models.decoder import CausalLM
from torchprime.raw_tokenizer import load_tokenizer_json

# Relative difference of logits between the trainer and transformers that is accepted without
# further measurement. Both round in different orders; a deep model in bf16 differs by more, and
# then `verify` measures how much rounding changes that model's logits.
LOGIT_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-2}
PROMPT_TOKENS = 64
KEPT_TOKENS = 8  # tokens stored for each prompt in the certificate
PROMPTS = (
    "Question: A baker has 37 trays with 12 rolls each. On Monday she sells 158 rolls, and on "
    "Tuesday three times as many as there are trays. Each roll costs 0.45 euros. How many rolls "
    "are left on Wednesday, and how much money has she taken in? Explain every step.\nAnswer: She "
    "begins with 37 * 12 = 444 rolls.",
    "The ferry left the harbour an hour before sunrise. In the café on the upper deck, an old man "
    "was reading a newspaper aloud, slowly, as if each word were a stone that he had to turn over "
    "first: Straße, montaña, 東京, река. Nobody listened but a child, who asked him why the sea "
    "was not falling off the map.",
    "import json\n\n\ndef read_records(path, limit=1000):\n    with open(path) as file:\n"
    "        for number, line in enumerate(file):\n            if number >= limit:\n"
    "                return\n            record = json.loads(line)\n"
    "            if not record['id']:\n"
    "                raise ValueError(f'line {number} has no id')\n            yield record\n",
)

Logits = npt.NDArray[np.float32]


@dataclass(frozen=True)
class PromptLogits:
    """The logits that one program computes for the prompts."""

    ids: npt.NDArray[np.int64]  # [B, S]
    logits: Logits  # [B, S, V]
    computed_by: str  # for people


def encode_prompts(
    tokenizer_json: Path, prompts: Sequence[str] = PROMPTS, *, longest: int = PROMPT_TOKENS
) -> npt.NDArray[np.int64]:
    """Return the first ids of each prompt, without special tokens: [B, S], S the shortest prompt's
    length."""
    raw, _ = load_tokenizer_json(tokenizer_json)
    encoded = [e.ids for e in raw.encode_batch(list(prompts), add_special_tokens=False)]
    length = min(longest, *(len(ids) for ids in encoded))
    return np.array([ids[:length] for ids in encoded], dtype=np.int64)


def prompt_ids(folder: Path, architecture: Architecture) -> npt.NDArray[np.int64]:
    """Return the ids [B, S] of PROMPTS for a model and its tokenizer's folder; S is at most the
    number of the model's positions."""
    longest = min(PROMPT_TOKENS, architecture.max_position_embeddings)
    return encode_prompts(folder / "tokenizer.json", longest=longest)


def decoder_logits(
    config: Mapping[str, Any],
    tensor_of: Callable[[str], Tensor],
    dtype: torch.dtype,
    ids: npt.NDArray[np.int64],
) -> Logits:
    """Return the logits [B, S, V] of our own decoder on the CPU, for rows without padding."""
    architecture = architecture_from_hf(config)
    with torch.device("meta"):
        model = CausalLM(architecture)
    names = [name for name, _ in model.named_parameters()]
    model.load_state_dict({name: tensor_of(name).to(dtype) for name in names}, assign=True)
    rows = torch.as_tensor(ids)
    positions = torch.arange(rows.shape[1]).expand_as(rows)
    with torch.no_grad():
        return model.logits(rows, positions, torch.ones_like(rows)).numpy()


def no_room(num_parameters: int, dtype: torch.dtype) -> str:
    """Return the reason why host memory can't hold the model twice; empty if it can."""
    needed = 2 * num_parameters * dtype.itemsize
    free = available_memory()
    if needed <= free:
        return ""
    return (
        f"transformers needs about {needed / 1e9:.1f} GB of host memory, {free / 1e9:.1f} GB are "
        "free"
    )


def likeliest(logits: Logits) -> dict[str, float]:
    """Return the largest logits of one position by token id, in the certificate's form."""
    best = np.argsort(-logits, kind="stable")[:KEPT_TOKENS]
    return {str(i): float(f"{logits[i]:.7g}") for i in best.tolist()}
