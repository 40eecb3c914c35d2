"""Prepared data as plain values, which torchprime.cli.before.inspect_data shows to a person.

Everything is taken from the batches as the device gets them, not from the rows they were made of:
ids, targets, weights, positions and segments are read back from the five arrays. A weight belongs
to the slot that predicts (law 4), but a person thinks of the predicted token, so each token here
has the weight of the slot before it. If an example continues in another block, the last slot's
target has no token in this block; it is the segment's `beyond`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from torchprime.data.blocks.batch import Batch
from torchprime.data.blocks.budget import Budget
from torchprime.data.blocks.dataset import PackedDataset
from torchprime.data.blocks.order import EMPTY_BLOCK, batch_indices
from torchprime.data.blocks.replay import ReplayOrder
from torchprime.data.leaks.report import LeakReport
from torchprime.data.report import DataReport
from torchprime.data.templates.reasoning import reasoning_policy
from torchprime.data.templates.render import ChatTemplate
from torchprime.data.tokenizer.load import Tokenizer
from torchprime.data.tokens.completions import IGNORED, RULES

SHOWN_BATCHES, SHOWN_BLOCKS = 2, 8
MOST_BINS = 24
# A tail longer than this many times the 99th percentile is collected in the histogram's last bin.
TAIL = 1.5


# Batches ------------------------------------------------------------------------------------------


class Target(NamedTuple):
    """The target of a slot, and its weight."""

    id: int
    text: str
    weight: float


class Token(NamedTuple):
    """One real slot. Texts are pieces as Tokenizer.pieces gives them.

    Attributes:
        weight: of the slot before, which predicts this token; 0 for context.
        target: the target of this slot, if it carries loss.
    """

    id: int
    text: str
    position: int
    rule: str
    weight: float
    target: Target | None


@dataclass(frozen=True)
class Segment:
    """A piece of a block: `tokens` begin at `begin` of an example with `example_length` tokens."""

    number: int
    row_id: str
    source: str
    begin: int
    example_length: int
    tokens: list[Token]

    @property
    def is_cut(self) -> bool:
        return len(self.tokens) < self.example_length

    @property
    def beyond(self) -> Target | None:
        """The first token of the example's next piece, which the last slot here predicts."""
        return self.tokens[-1].target


@dataclass(frozen=True)
class Block:
    """One row of a batch; `number` is its index in the data set, None for an empty block."""

    number: int | None
    segments: list[Segment]
    padding: int

    @property
    def real_tokens(self) -> int:
        return sum(len(segment.tokens) for segment in self.segments)

    @property
    def supervised_tokens(self) -> int:
        return sum(t.target is not None for segment in self.segments for t in segment.tokens)


@dataclass(frozen=True)
class ShownBatch:
    """The batch of the 0-based `step`: totals of the whole batch, and its first blocks."""

    step: int
    hash: str
    num_blocks: int
    slot_tokens: int
    real_tokens: int
    supervised_tokens: int
    weight_sum: float
    blocks: list[Block]


def first_batches(
    packed: PackedDataset,
    tokenizer: Tokenizer,
    *,
    seed: int,
    global_batch_size: int,
    replay: ReplayOrder | None = None,
    batches: int = SHOWN_BATCHES,
    most_blocks: int = SHOWN_BLOCKS,
) -> list[ShownBatch]:
    """Yield the first steps' batches in the run's own order, with up to `most_blocks` blocks."""
    shown = []
    for step in range(batches):
        if replay is None:
            indices = batch_indices(packed.num_blocks, seed, step, global_batch_size)
        else:
            indices = replay.blocks(step)
        shown.append(_shown(packed, tokenizer, step, indices, most_blocks))
    return shown


def _shown(
    packed: PackedDataset,
    tokenizer: Tokenizer,
    step: int,
    indices: npt.NDArray[np.int64],
    most_blocks: int,
) -> ShownBatch:
    batch = packed.batch(indices)
    rows = range(min(len(indices), most_blocks))
    used = np.unique([batch.input_ids[: len(rows)], np.maximum(batch.targets[: len(rows)], 0)])
    texts = dict(zip(used.tolist(), tokenizer.pieces(used.tolist()), strict=True))
    return ShownBatch(
        step=step,
        hash=batch.hash(),
        num_blocks=len(indices),
        slot_tokens=batch.slot_tokens,
        real_tokens=batch.real_tokens,
        supervised_tokens=batch.supervised_tokens,
        weight_sum=batch.weight_sum,
        blocks=[_block(packed, batch, row, int(indices[row]), texts) for row in rows],
    )


def _block(
    packed: PackedDataset, batch: Batch, row: int, block: int, texts: Mapping[int, str]
) -> Block:
    padding = int(np.count_nonzero(batch.segment_ids[row] == 0))
    if block == EMPTY_BLOCK:
        return Block(None, [], padding)
    segments: list[Segment] = []
    for number, piece in enumerate(packed.pieces(block), start=1):
        example = int(packed.plan.examples[piece])
        tokens = packed.store.tokens(example)
        begin, length = int(packed.plan.begins[piece]), int(packed.plan.lengths[piece])
        rules = [RULES[rule] for rule in tokens.rules[begin : begin + length].tolist()]
        slots = np.flatnonzero(batch.segment_ids[row] == number)
        segments.append(
            Segment(
                number=number,
                row_id=packed.store.row_id(example),
                source=packed.source_names[int(packed.store.sources[example])],
                begin=begin,
                example_length=len(tokens.ids),
                tokens=list(_tokens(batch, row, slots, rules, texts)),
            )
        )
    return Block(block, segments, padding)


def _tokens(
    batch: Batch,
    row: int,
    slots: npt.NDArray[np.int64],
    rules: Sequence[str],
    texts: Mapping[int, str],
) -> Iterator[Token]:
    ids, targets, weights, positions = (
        array[row, slots].tolist()
        for array in (batch.input_ids, batch.targets, batch.loss_weights, batch.position_ids)
    )
    before = 0.0  # nothing in this segment predicts its first token
    for i, own in enumerate(ids):
        target = None
        if targets[i] != IGNORED:
            target = Target(targets[i], texts[targets[i]], weights[i])
        yield Token(own, texts[own], positions[i], rules[i], before, target)
        before = weights[i]


class RuleCount(NamedTuple):
    """The number of tokens that a rule labelled, and how many of them carry loss."""

    rule: str
    tokens: int
    supervised: int


def count_rules(batches: Sequence[ShownBatch]) -> list[RuleCount]:
    """Count the rules in the blocks shown, in the order of RULES, without unused rules."""
    tokens = [
        token
        for batch in batches
        for block in batch.blocks
        for segment in block.segments
        for token in segment.tokens
    ]
    counts = []
    for rule in RULES:
        mine = [token for token in tokens if token.rule == rule]
        if mine:
            counts.append(RuleCount(rule, len(mine), sum(token.weight > 0 for token in mine)))
    return counts


# Lengths ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bin:
    """Examples of `first` to `last` tokens; the last bin may hold a whole tail."""

    first: int
    last: int
    count: int
    open: bool = False


def length_bins(lengths: npt.NDArray[np.int64], most: int = MOST_BINS) -> list[Bin]:
    """Return a histogram with bins of a round width (1, 2 or 5 times 10^n), at most `most`."""
    longest = int(lengths.max())
    end = min(longest, int(np.percentile(lengths, 99) * TAIL))
    start = int(lengths.min())
    widths = (factor * 10**power for power in range(20) for factor in (1, 2, 5))
    width = next(w for w in widths if end // w - start // w + 1 <= most)
    first = start // width
    places = np.minimum(lengths // width, end // width) - first
    counts = np.bincount(places, minlength=end // width - first + 1).tolist()
    bins = [Bin(p * width, (p + 1) * width - 1, n) for p, n in enumerate(counts, start=first)]
    if longest > bins[-1].last:
        bins[-1] = Bin(bins[-1].first, longest, bins[-1].count, open=True)
    return bins


# All of it ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ShownTemplate:
    """The chat template and its effects; `used` is True if any row is a conversation."""

    name: str
    used: bool
    marks: bool
    reasoning: str
    warnings: tuple[str, ...]
    text: str

    @classmethod
    def of(cls, template: ChatTemplate, used: bool) -> ShownTemplate:
        return cls(
            template.name,
            used,
            template.has_generation_marks,
            reasoning_policy(template),
            template.warnings,
            template.text,
        )


@dataclass(frozen=True)
class Inspection:
    """All values of an inspection.

    Attributes:
        reports: of the training rows, then of the held-out rows if there are any.
        special: texts of the special tokens.
    """

    name: str
    reports: list[DataReport]
    leaks: LeakReport | None
    template: ShownTemplate | None
    fingerprints: Mapping[str, str | None]
    budget: Budget
    bins: list[Bin]
    batches: list[ShownBatch]
    rules: list[RuleCount]
    special: frozenset[str]

    @cached_property
    def weights(self) -> list[float]:
        """The loss weights that occur in the blocks shown, ascending."""
        return sorted(
            {
                token.target.weight
                for batch in self.batches
                for block in batch.blocks
                for segment in block.segments
                for token in segment.tokens
                if token.target is not None
            }
        )
