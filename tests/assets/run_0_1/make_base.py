"""Write the base model, tokenizer and rows that the kept run was trained on.

    python make_base.py FOLDER

Only transformers and tokenizers are used, so the script does not depend on a version of torchprime.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM

SPECIALS = ["<s>", "</s>", "<pad>"]
LETTERS = [chr(code) for code in range(ord("!"), ord("~") + 1)] + ["Ġ"]


def write_tokenizer(folder: Path) -> int:
    """Write a tokenizer with one token for each printable character; return its size."""
    vocab = {token: number for number, token in enumerate([*SPECIALS, *LETTERS])}
    raw = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    raw.add_special_tokens(SPECIALS)
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    raw.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": "</s>", "pad_token": "<pad>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings) + "\n")
    return len(vocab)


def write_model(folder: Path, vocab_size: int) -> None:
    """Write a Llama of two layers with random weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def write_rows(path: Path, numbers: range) -> None:
    """Write additions as rows of prompt and completion."""
    sums = [(n % 7 + 1, n // 7 % 9 + 1) for n in numbers]
    rows = [{"prompt": f"{a} + {b} = ", "completion": f"#### {a + b}"} for a, b in sums]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    (folder / "base").mkdir(parents=True, exist_ok=True)
    write_model(folder / "base", write_tokenizer(folder / "base"))
    write_rows(folder / "train.jsonl", range(0, 50))
    write_rows(folder / "heldout.jsonl", range(50, 63))
