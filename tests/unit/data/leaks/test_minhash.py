"""Signatures equal those of datasketch; the bands find similar pairs as often as promised."""

from __future__ import annotations

import numpy as np
import pytest
from datasketch import MinHash

from torchprime.data.leaks.minhash import Signer, bands_for, lsh_recall, to_32_bits
from torchprime.data.leaks.shingles import shingle

NONE = np.array([], np.uint64)
TEXTS = [
    "a quick brown fox jumps over the lazy dog near the river bank today",
    "",
    "a quick brown fox jumps over the lazy cat near the river bank today",
    "three",
]


def test_signatures_are_datasketchs() -> None:
    signer = Signer(32, 5, NONE)
    keys, signatures = signer.sign(TEXTS)
    found = shingle(TEXTS, NONE)
    assert np.array_equal(keys, found.keys)
    for row in range(len(TEXTS)):
        values = to_32_bits(found.values[found.starts[row] : found.starts[row + 1]])
        theirs = MinHash(32, 5, hashfunc=int, scheme="affine32")
        for value in values:
            theirs.update(value)
        if len(values):
            assert np.array_equal(signatures[row], theirs.hashvalues), TEXTS[row]
        else:
            assert (signatures[row] == 2**32 - 1).all()
    similar = signer.minhash(signatures[0]).jaccard(signer.minhash(signatures[2]))
    assert 0.2 < similar < 0.9


def test_rows_are_signed_alike_alone_and_together() -> None:
    signer = Signer(16, 1, NONE)
    together = signer.sign(TEXTS)[1]
    alone = [signer.sign([text])[1][0] for text in TEXTS]
    assert np.array_equal(together, np.stack(alone))


@pytest.mark.parametrize(("bands", "size"), [(1, 1), (4, 2), (16, 8)])
def test_recall_is_the_share_of_equal_bands_in_a_simulation(bands: int, size: int) -> None:
    equal = np.random.default_rng(0).random((20_000, bands, size)) < 0.8
    share = equal.all(-1).any(-1).mean()
    assert lsh_recall(0.8, bands, size) == pytest.approx(share, abs=0.015)


@pytest.mark.parametrize("threshold", [0.1, 0.5, 0.8, 0.95, 1.0])
@pytest.mark.parametrize("num_perm", [16, 128])
def test_bands_are_the_longest_that_find_nine_of_ten(threshold: float, num_perm: int) -> None:
    bands, size = bands_for(threshold, num_perm)
    assert bands * size <= num_perm
    good = [
        s for s in range(1, num_perm // 2 + 1) if 1 - (1 - threshold**s) ** (num_perm // s) >= 0.9
    ]
    assert size == max(good, default=1)
