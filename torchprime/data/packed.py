"""All blocks of a data set, compact: examples' ids and targets end to end, in block order.

Only real tokens are kept; padding, positions, segments and weights follow from the lengths and
are made when a batch is asked for.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from torchprime.data.batch import Batch
from torchprime.data.pack import pack
from torchprime.data.tokenize import IGNORED, Example

Ints = npt.NDArray[np.int64]


class PackedDataset:
    """Blocks of `block_size` slots; `batch(indices)` builds any of them, -1 an empty one."""

    def __init__(
        self,
        ids: npt.NDArray[np.int32],
        targets: npt.NDArray[np.int32],
        lengths: Ints,
        block_starts: Ints,
        *,
        block_size: int,
        pad_id: int,
    ) -> None:
        """Take arrays already in block order: block b holds examples block_starts[b:b+1]."""
        self.block_size = block_size
        self.pad_id = pad_id
        self._ids = ids
        self._targets = targets
        self._lengths = lengths
        self._block_starts = block_starts
        token_starts = np.concatenate([[0], np.cumsum(lengths)])
        self._block_tokens: Ints = token_starts[block_starts]
        self.block_real_tokens: Ints = np.diff(self._block_tokens)
        supervised = np.concatenate([[0], np.cumsum(targets != IGNORED)])
        self.block_supervised_tokens: Ints = np.diff(supervised[self._block_tokens])

    @classmethod
    def from_examples(
        cls, examples: Sequence[Example], *, block_size: int, pad_id: int, packing: str
    ) -> PackedDataset:
        """Plan the blocks and lay the examples down in that order, targets shifted in each."""
        lengths = np.array([len(example.ids) for example in examples], dtype=np.int64)
        plan = pack(lengths, block_size, packing)
        ordered = [examples[i] for i in plan.order.tolist()]
        return cls(
            np.concatenate([example.ids for example in ordered]),
            np.concatenate([example.targets() for example in ordered]),
            lengths[plan.order],
            plan.starts,
            block_size=block_size,
            pad_id=pad_id,
        )

    @property
    def num_blocks(self) -> int:
        return len(self._block_starts) - 1

    @property
    def num_examples(self) -> int:
        return len(self._lengths)

    @property
    def real_tokens(self) -> int:
        return len(self._ids)

    @property
    def supervised_tokens(self) -> int:
        return int(self.block_supervised_tokens.sum())

    @property
    def efficiency(self) -> float:
        """The part of all slots that holds a real token."""
        return self.real_tokens / (self.num_blocks * self.block_size)

    def batch(self, indices: npt.NDArray[np.int64]) -> Batch:
        """The blocks with these indices; -1 is a block of padding, without weight."""
        indices = np.asarray(indices, dtype=np.int64)
        if indices.ndim != 1 or ((indices < -1) | (indices >= self.num_blocks)).any():
            raise IndexError(
                f"expected a list of block indices from -1 to {self.num_blocks - 1}, got {indices}"
            )
        shape = (len(indices), self.block_size)
        input_ids = np.full(shape, self.pad_id, dtype=np.int32)
        targets = np.full(shape, IGNORED, dtype=np.int32)
        position_ids = np.zeros(shape, dtype=np.int32)
        segment_ids = np.zeros(shape, dtype=np.int32)
        for row, block in enumerate(indices.tolist()):
            if block == -1:
                continue
            start, end = self._block_tokens[block : block + 2].tolist()
            lengths = self._lengths[self._block_starts[block] : self._block_starts[block + 1]]
            used = end - start
            first_slots = np.cumsum(lengths) - lengths
            input_ids[row, :used] = self._ids[start:end]
            targets[row, :used] = self._targets[start:end]
            position_ids[row, :used] = np.arange(used) - np.repeat(first_slots, lengths)
            segment_ids[row, :used] = np.repeat(np.arange(1, len(lengths) + 1), lengths)
        loss_weights = (targets != IGNORED).astype(np.float32)
        return Batch(input_ids, targets, loss_weights, position_ids, segment_ids)

    def fingerprint(self) -> str:
        """sha256 of everything a batch can depend on: equal fingerprints, equal batches."""
        digest = hashlib.sha256(f"{self.block_size}:{self.pad_id}:".encode())
        parts = (
            ("ids", self._ids.astype("<i4")),
            ("targets", self._targets.astype("<i4")),
            ("lengths", self._lengths.astype("<i8")),
            ("block_starts", self._block_starts.astype("<i8")),
        )
        for name, array in parts:
            digest.update(f"{name}:{len(array)};".encode())
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()
