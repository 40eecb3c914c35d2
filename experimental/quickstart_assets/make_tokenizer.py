"""Train the quickstart's tokenizer: a byte-level BPE of 512 tokens, every digit alone.

Digits are split off before the merges are learnt, so `47` is always `4`, `7` and a sum looks the
same in `12 + 35 = 47`, in `12+35=47` and inside `<<12+35=47>>`. The byte alphabet is complete, so
every text round-trips. The text it learns from is regenerated from the data's seed: a part of the
pretraining documents and the training rows as the trainer renders them. Nothing is random; a rerun
writes the same bytes.

    python experimental/quickstart_assets/make_tokenizer.py --out torchprime/assets/quickstart/base
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path

from make_data import SEED, TRAIN_ROWS, draw_documents, draw_rows
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer

VOCAB_SIZE = 512
BOS, EOS, PAD = "<s>", "</s>", "<pad>"
MAX_LENGTH = 512
DOCUMENTS = 4000


def training_text(seed: int) -> Iterator[str]:
    for document in draw_documents(seed, DOCUMENTS):
        yield document["text"]
    for row in draw_rows(random.Random(f"{seed} train"), TRAIN_ROWS, for_test=False):
        yield f"Question:\n{row['question']}\n\n\nAnswer:\n{row['answer']}"


def train_tokenizer(texts: Iterator[str]) -> Tokenizer:
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != VOCAB_SIZE:
        raise ValueError(
            f"the text gave {tokenizer.get_vocab_size()} tokens, expected {VOCAB_SIZE}: "
            "it has too few different words for so many merges"
        )
    bos = (BOS, tokenizer.token_to_id(BOS))
    tokenizer.post_processor = TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[bos]
    )
    return tokenizer


def write_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "model_max_length": MAX_LENGTH,
        "clean_up_tokenization_spaces": False,
    }
    files = {
        "tokenizer.json": tokenizer.to_str(pretty=True),
        "tokenizer_config.json": json.dumps(settings, indent=2),
    }
    for name, text in files.items():
        (folder / name).write_text(text + "\n", encoding="utf-8", newline="\n")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Write the quickstart's tokenizer.")
    parser.add_argument("--out", type=Path, required=True, help="the base model's folder")
    parser.add_argument("--seed", type=int, default=SEED, help="the data's seed")
    options = parser.parse_args(arguments)
    write_tokenizer(train_tokenizer(training_text(options.seed)), options.out)


if __name__ == "__main__":
    main()
