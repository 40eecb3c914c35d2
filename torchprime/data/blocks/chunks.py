"""Examples from one chunk of rows: the part of data preparation that worker processes share."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from torchprime.config.sections.dataset import (
    LossOn,
    MixtureBy,
    Packing,
    Reasoning,
    SpecialTokensInText,
    Truncation,
    Turns,
)
from torchprime.config.sections.loss import Average
from torchprime.data.blocks.store import to_record_batch
from torchprime.data.files.record import Rejection
from torchprime.data.rows.read import Row
from torchprime.data.shared.notes import RowNotes
from torchprime.data.templates.render import ChatTemplate
from torchprime.data.templates.turns import REASON_NOT_SERVED
from torchprime.data.tokenizer.load import Tokenizer, load_tokenizer
from torchprime.data.tokens.borders import REASON_NOT_FED
from torchprime.data.tokens.branches import AUTO, BRANCH, branches
from torchprime.data.tokens.completions import Example, averaged, fit_to_block, loss_mode
from torchprime.data.tokens.conversations import ChatRules, tokenize_chat
from torchprime.data.tokens.marked_text import Markers, tokenize_texts

LAST = "last_assistant"
# No single sequence of the whole conversation is right for every turn; one for each answer is.
NOT_AS_SERVED = (REASON_NOT_SERVED, REASON_NOT_FED)


@dataclass(frozen=True)
class Settings:
    """The settings that turn rows into examples; the config schema has their defaults."""

    block_size: int
    compute_loss_on: LossOn
    packing: Packing
    truncation: Truncation
    max_examples: int | None
    max_rejected_fraction: float
    max_unreadable_rows: int
    max_row_characters: int
    replay_share: float | None
    mixture_by: MixtureBy
    turns: Turns
    reasoning: Reasoning
    special_tokens_in_text: SpecialTokensInText
    markers: Markers | None
    seed: int  # 0 if there is no mixture, which alone uses it
    average: Average
    replay_apart: bool = False  # no block holds both replay and other examples


@dataclass(frozen=True)
class Outcome:
    """The examples, rejections and counts from one chunk of rows."""

    examples: pa.RecordBatch | None
    count: int
    rejected: list[Rejection]
    truncated: list[str]
    boundaries: dict[str, int]
    notes: RowNotes


@dataclass(frozen=True)
class Work:
    """The tokenizer, template and settings for a chunk; workers receive it as two small values."""

    tokenizer: Tokenizer
    template: ChatTemplate | None
    settings: Settings

    def run(self, rows: Sequence[Row]) -> Outcome:
        """Tokenize, truncate and encode one chunk."""
        s, notes = self.settings, RowNotes()
        texts = [row for row in rows if not row.messages]
        results: dict[str, list[Example | Rejection]] = {}
        done = tokenize_texts(texts, self.tokenizer, s.compute_loss_on, s.markers)
        for row, result in zip(texts, done, strict=True):
            results[row.row_id] = [result]
        chats = [row for row in rows if row.messages]
        if chats:
            results |= self._chats(chats, notes)
        examples: list[Example] = []
        rejected: list[Rejection] = []
        for result in (result for row in rows for result in results[row.row_id]):
            if isinstance(result, Example) and s.packing not in ("bfd_split", "wrapped"):
                result = fit_to_block(result, s.block_size, s.truncation)
            if isinstance(result, Example):
                examples.append(averaged(result) if s.average == "examples" else result)
            else:
                rejected.append(result)
        return Outcome(
            to_record_batch(examples) if examples else None,
            len(examples),
            rejected,
            [example.row_id for example in examples if example.truncated],
            dict(Counter(example.boundary for example in examples)),
            notes,
        )

    def _chats(self, rows: Sequence[Row], notes: RowNotes) -> dict[str, list[Example | Rejection]]:
        """Return one result for each row, or one for each answer if turns are branches."""
        mode = loss_mode(self.settings.compute_loss_on, rows[0])
        if self.settings.turns == BRANCH:
            return self._branches(rows, mode, notes)
        done = self._tokenized(rows, mode, notes)
        results: dict[str, list[Example | Rejection]] = {
            row.row_id: [result] for row, result in zip(rows, done, strict=True)
        }
        if self.settings.turns == AUTO:
            apart = [
                row
                for row, result in zip(rows, done, strict=True)
                if isinstance(result, Rejection) and result.reason in NOT_AS_SERVED
            ]
            for row in apart:
                notes.notice("conversations that became one example for each answer", row.row_id)
            results |= self._branches(apart, mode, notes)
        return results

    def _branches(
        self, rows: Sequence[Row], mode: LossOn, notes: RowNotes
    ) -> dict[str, list[Example | Rejection]]:
        of_row = {row.row_id: branches(row, mode == "last_assistant") for row in rows}
        done = iter(self._tokenized([b for bs in of_row.values() for b in bs], LAST, notes))
        return {row_id: [next(done) for _ in bs] for row_id, bs in of_row.items()}

    def _tokenized(
        self, rows: Sequence[Row], mode: LossOn, notes: RowNotes
    ) -> list[Example | Rejection]:
        assert self.template is not None
        rules = ChatRules(mode, self.settings.reasoning, self.settings.special_tokens_in_text)
        return tokenize_chat(rows, self.tokenizer, self.template, rules, notes)


_worker: Work | None = None


def start_worker(folder: Path, template: ChatTemplate | None, settings: Settings) -> None:
    global _worker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the worker processes are the parallelism
    _worker = Work(load_tokenizer(folder), template, settings)


def run_in_worker(rows: list[Row]) -> Outcome:
    assert _worker is not None
    return _worker.run(rows)
