"""MinHash signatures of many rows at once, and the length of the LSH bands that propose pairs.

A signature holds, for each of `num_perm` permutations of all shingles, the first of the row's
shingles. The share of equal values in two signatures estimates the Jaccard similarity of the rows.
LSH divides signatures into bands and proposes rows that are equal in a whole band.
"""

from __future__ import annotations

import numpy as np
from datasketch import MinHash

from torchprime.data.leaks.shingles import shingle

NUM_PERM = 128
_SCHEME = "affine32"  # datasketch's 32-bit permutations


def bands_for(threshold: float, num_perm: int) -> tuple[int, int]:
    """Return (bands, values per band): the longest bands with a recall of 0.9 at the threshold.

    Longer bands propose fewer unlike pairs. Exact comparison is cheap, so recall has priority.
    """
    fitting = [
        (num_perm // size, size)
        for size in range(1, num_perm // 2 + 1)
        if lsh_recall(threshold, num_perm // size, size) >= 0.9
    ]
    return max(fitting, key=lambda bands: bands[1], default=(num_perm, 1))


def lsh_recall(similarity: float, bands: int, size: int) -> float:
    """Return the probability that a pair of this Jaccard similarity is proposed."""
    return 1 - (1 - similarity**size) ** bands


class Signer:
    """A maker of MinHash signatures of many rows, equal to those of datasketch's MinHash."""

    def __init__(self, num_perm: int, seed: int, frequent: np.ndarray) -> None:
        self.seed, self.frequent = seed, frequent
        self.permutations = np.asarray(MinHash(num_perm, seed, scheme=_SCHEME).permutations)

    def sign(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Return uint64 keys [rows] and uint32 signatures [rows, num_perm], all ones if empty."""
        found = shingle(texts, self.frequent)
        hashes = _mix32(to_32_bits(found.values))
        full = np.flatnonzero(np.diff(found.starts))
        signatures = np.full((len(texts), len(self.permutations[0])), 0xFFFFFFFF, np.uint32)
        if len(full):
            # The loop is over permutations, not rows: each pass is over an array that stays in the
            # CPU cache.
            columns = np.empty((signatures.shape[1], len(full)), np.uint32)
            for column, a, b in zip(columns, *self.permutations, strict=True):
                np.minimum.reduceat(hashes * a + b, found.starts[:-1][full], out=column)
            signatures[full] = columns.T
        return found.keys, signatures

    def minhash(self, signature: np.ndarray) -> MinHash:
        """Return one row's signature in the form that datasketch's index takes."""
        return MinHash(
            seed=self.seed,
            hashvalues=signature,
            permutations=self.permutations,
            scheme=_SCHEME,
        )


def to_32_bits(values: np.ndarray) -> np.ndarray:
    """Reduce 64-bit shingles to the 32 bits that MinHash uses."""
    return (values >> np.uint64(32)).astype(np.uint32)


def _mix32(values: np.ndarray) -> np.ndarray:
    """Mix 32-bit hashes as datasketch does before its permutations (MurmurHash3's last step)."""
    values = (values ^ (values >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    values = (values ^ (values >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return values ^ (values >> np.uint32(16))


_worker: list[Signer] = []  # in a worker process, its only one


def start_worker(num_perm: int, seed: int, frequent: np.ndarray) -> None:
    _worker[:] = [Signer(num_perm, seed, frequent)]


def sign_in_worker(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    return _worker[0].sign(texts)
