"""The blocks of one step as every backend receives them: five [B, S] arrays and a hash.

Two runs on different hardware compare the hashes to prove that they saw the same batch.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

FIELDS = ("input_ids", "targets", "loss_weights", "position_ids", "segment_ids")


@dataclass(frozen=True, eq=False)
class Batch:
    """Arrays of shape [B, S]. A padding slot has segment 0, target -100, weight 0, position 0."""

    input_ids: npt.NDArray[np.int32]
    targets: npt.NDArray[np.int32]
    loss_weights: npt.NDArray[np.float32]
    position_ids: npt.NDArray[np.int32]
    segment_ids: npt.NDArray[np.int32]
    # [B, S]; only in mixtures, for the losses per source
    source_ids: npt.NDArray[np.int32] | None = None

    def arrays(self) -> dict[str, npt.NDArray[np.int32] | npt.NDArray[np.float32]]:
        return {name: getattr(self, name) for name in FIELDS}

    def hash(self) -> str:
        """Return 16 hex digits from names, types, shapes and little-endian bytes of the arrays."""
        digest = hashlib.sha256()
        for name, array in self.arrays().items():
            little = array.astype(array.dtype.newbyteorder("<"), copy=False)
            digest.update(f"{name}:{little.dtype.str}:{little.shape};".encode())
            digest.update(np.ascontiguousarray(little).data)
        return digest.hexdigest()[:16]

    @property
    def slot_tokens(self) -> int:
        return int(self.input_ids.size)

    @property
    def real_tokens(self) -> int:
        return int(np.count_nonzero(self.segment_ids))

    @property
    def supervised_tokens(self) -> int:
        return int(np.count_nonzero(self.targets >= 0))

    @property
    def weight_sum(self) -> float:
        return float(self.loss_weights.sum(dtype=np.float64))

    def segment_lengths(self) -> npt.NDArray[np.int64]:
        """Return [B, S]: the number of tokens of each token's segment; of padding, its own."""
        return np.stack([np.bincount(row)[row] for row in self.segment_ids])

    def source_weights(self, count: int) -> tuple[float, ...]:
        """Return the weight sum of each source; () if there is only one source."""
        if self.source_ids is None:
            return ()
        flat, sources = self.loss_weights.reshape(-1), self.source_ids.reshape(-1)
        sums = np.bincount(sources, weights=flat.astype(np.float64), minlength=count)
        return tuple(sums.tolist())


def empty_batch(shape: tuple[int, int], *, with_sources: bool) -> Batch:
    """Return a batch [B, S] of padding, for a step that is traced and not run."""
    zeros = np.zeros(shape, np.int32)
    sources = zeros if with_sources else None
    targets = np.full(shape, -100, np.int32)
    return Batch(zeros, targets, zeros.astype(np.float32), zeros, zeros, sources)
