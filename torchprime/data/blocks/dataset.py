"""The blocks of a data set: a plan over stored examples. Batches are built on request.

Only real tokens are stored; padding, positions, segments and shifted targets are computed from the
plan.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from torchprime.config.sections.dataset import Packing
from torchprime.data.blocks.batch import Batch
from torchprime.data.blocks.pack import Plan, pack
from torchprime.data.blocks.store import ExampleStore
from torchprime.data.tokens.completions import IGNORED, RULES, STOP, Example

STOP_SAMPLE = 256
Ints = npt.NDArray[np.int64]


class PackedDataset:
    """Blocks of `block_size` slots; `batch(indices)` builds any of them, an empty one for -1."""

    def __init__(self, store: ExampleStore, plan: Plan, *, block_size: int, pad_id: int) -> None:
        self.store, self.plan = store, plan
        self.block_size, self.pad_id = block_size, pad_id
        whole = store.lengths[plan.examples] == plan.lengths
        supervised = np.where(whole, store.supervised[plan.examples], 0)
        for piece in np.flatnonzero(~whole).tolist():
            supervised[piece] = int((self._targets(piece)[0] != IGNORED).sum())
        self.block_real_tokens: Ints = _per_block(plan.lengths, plan.starts)
        self.block_supervised_tokens: Ints = _per_block(supervised, plan.starts)

    @classmethod
    def from_examples(
        cls, examples: Sequence[Example], *, block_size: int, pad_id: int, packing: Packing
    ) -> PackedDataset:
        """Plan the blocks of these examples, all in memory."""
        store = ExampleStore.from_examples(examples)
        plan = pack(store.lengths, block_size, packing)
        return cls(store, plan, block_size=block_size, pad_id=pad_id)

    @property
    def num_blocks(self) -> int:
        return self.plan.num_blocks

    @property
    def num_examples(self) -> int:
        """The number of examples in the blocks; a split example counts once."""
        return len(np.unique(self.plan.examples))

    @property
    def real_tokens(self) -> int:
        return int(self.block_real_tokens.sum())

    @property
    def supervised_tokens(self) -> int:
        return int(self.block_supervised_tokens.sum())

    @property
    def efficiency(self) -> float:
        """The share of all slots that hold a real token."""
        return self.real_tokens / (self.num_blocks * self.block_size)

    @property
    def source_names(self) -> list[str]:
        """The names of the mixture's sources; a slot's source is an index into this list."""
        return self.store.source_names

    @property
    def block_sources(self) -> Ints:
        """The source of the first example of each block, an index into `source_names`."""
        return self.store.sources[self.plan.examples[self.plan.starts[:-1]]].astype(np.int64)

    def pieces(self, block: int) -> range:
        """Return the pieces of one block, in order; segment n + 1 is the n-th piece."""
        return range(int(self.plan.starts[block]), int(self.plan.starts[block + 1]))

    def _targets(self, piece: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
        """Return the target and weight of each token of a piece.

        If the example continues in another piece, the last token predicts that piece's first token.
        """
        tokens = self.store.tokens(int(self.plan.examples[piece]))
        begin, length = int(self.plan.begins[piece]), int(self.plan.lengths[piece])
        targets = np.full(length, IGNORED, dtype=np.int32)
        weights = np.zeros(length, dtype=np.float32)
        nexts = tokens.weights[begin + 1 : begin + 1 + length]
        used = np.flatnonzero(nexts > 0)
        targets[used] = tokens.ids[begin + 1 + used]
        weights[used] = nexts[used]
        return targets, weights

    def batch(self, indices: npt.NDArray[np.int64]) -> Batch:
        """Build the blocks with these indices; -1 is a block of padding, without weight."""
        indices = np.asarray(indices, dtype=np.int64)
        if indices.ndim != 1 or ((indices < -1) | (indices >= self.num_blocks)).any():
            raise IndexError(
                f"expected a list of block indices from -1 to {self.num_blocks - 1}, got {indices}"
            )
        shape = (len(indices), self.block_size)
        input_ids = np.full(shape, self.pad_id, dtype=np.int32)
        targets = np.full(shape, IGNORED, dtype=np.int32)
        loss_weights = np.zeros(shape, dtype=np.float32)
        position_ids = np.zeros(shape, dtype=np.int32)
        segment_ids = np.zeros(shape, dtype=np.int32)
        source_ids = np.zeros(shape, dtype=np.int32) if len(self.source_names) > 1 else None
        for row, block in enumerate(indices.tolist()):
            if block == -1:
                continue
            slot = 0
            for number, piece in enumerate(self.pieces(block), start=1):
                example = int(self.plan.examples[piece])
                begin, length = int(self.plan.begins[piece]), int(self.plan.lengths[piece])
                here = (row, slice(slot, slot + length))
                input_ids[here] = self.store.tokens(example).ids[begin : begin + length]
                targets[here], loss_weights[here] = self._targets(piece)
                position_ids[here] = np.arange(length)
                segment_ids[here] = number
                if source_ids is not None:
                    source_ids[here] = self.store.sources[example]
                slot += length
        return Batch(input_ids, targets, loss_weights, position_ids, segment_ids, source_ids)

    def rules(self, block: int) -> list[str]:
        """Return for each slot the rule that set its token's label; "" for padding."""
        names: list[str] = []
        for piece in self.pieces(block):
            begin, length = int(self.plan.begins[piece]), int(self.plan.lengths[piece])
            rules = self.store.tokens(int(self.plan.examples[piece])).rules
            names += [RULES[rule] for rule in rules[begin : begin + length].tolist()]
        return names + [""] * (self.block_size - len(names))

    def stop_ids(self) -> list[int]:
        """Return the ids that end supervised turns, as found in the first examples."""
        ends: set[int] = set()
        for example in range(min(len(self.store), STOP_SAMPLE)):
            tokens = self.store.tokens(example)
            stops = np.flatnonzero(tokens.rules == STOP)
            # If a stop marker has several tokens, none of them ends a turn alone.
            apart = np.diff(np.concatenate([[-2], stops, [len(tokens.ids) + 1]])) > 1
            ends.update(tokens.ids[stops[apart[:-1] & apart[1:]]].tolist())
        return sorted(ends)

    def fingerprint(self) -> str:
        """Return a sha256 of everything a batch depends on: if equal, so are the batches."""
        digest = hashlib.sha256(f"{self.block_size}:{self.pad_id}:".encode())
        digest.update(self.store.fingerprint().encode())
        for name, array in self.plan.arrays().items():
            digest.update(f"{name}:{len(array)};".encode())
            digest.update(np.ascontiguousarray(array.astype("<i8")).data)
        return digest.hexdigest()


def _per_block(values: Ints, starts: Ints) -> Ints:
    """Return the sums of per-piece values over each block."""
    return np.diff(np.concatenate([[0], np.cumsum(values)])[starts])
