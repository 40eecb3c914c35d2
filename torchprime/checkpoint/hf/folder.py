"""The Hugging Face folder that a run exports: its facts, and all its files except the weights."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchprime.checkpoint.hf.portable import check_tokenizer, write_tokenizer
from torchprime.checkpoint.hf.portable_config import portable_config, portable_generation_config
from torchprime.checkpoint.hf.write import WeightLayout
from torchprime.files.atomic import write_json, write_text

CARD = "README.md"


@dataclass(frozen=True)
class HfFolder:
    """A Hugging Face folder to be written.

    Attributes:
        layout: the weights, by name and shape, and their split into files.
        config: the source's config.json, parsed.
        generation_config: the source's generation_config.json, parsed; None if it has none.
        tokenizer_folder: holds tokenizer.json and what goes with it.
        eos_token_id: the stop token that was trained.
        chat_templates: those that were trained with, by name; None keeps the tokenizer's own.
    """

    layout: WeightLayout
    config: Mapping[str, Any]
    generation_config: Mapping[str, Any] | None
    tokenizer_folder: Path
    eos_token_id: int
    chat_templates: Mapping[str, str] | None = None

    def check(self) -> list[str]:
        """Find every contradiction that writing the folder would find, without weights.

        Also read the tokenizer as it would be exported through AutoTokenizer, and compare its ids
        with tokenizer.json's. This takes a second.

        Returns:
            The repairs made in the source's files, as lines for the user.

        Raises:
            CheckpointError: contradicting or incomplete input.
        """
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            repairs = self.write_small_files(folder, card="")
            check_tokenizer(folder)
        return repairs

    def write_small_files(self, folder: Path, card: str) -> list[str]:
        """Write all files except the weights: config, generation config, tokenizer, chat templates
        and card.

        Args:
            card: the text of README.md.

        Returns:
            The repairs made in the source's files, as lines for the user.

        Raises:
            CheckpointError: contradicting or incomplete input.
        """
        eos, layout = self.eos_token_id, self.layout
        config, repairs = portable_config(self.config, layout.spec, layout.dtype, eos)
        generation, more = portable_generation_config(self.generation_config, config, eos)
        write_json(folder / "config.json", config)
        write_json(folder / "generation_config.json", generation)
        write_tokenizer(folder, self.tokenizer_folder, eos=eos, chat_templates=self.chat_templates)
        write_text(folder / CARD, card)
        return [*repairs, *more]
