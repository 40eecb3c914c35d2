"""Threefry against the published test vectors and jax; masks against their definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from jax._src.prng import threefry_2x32
from torch import Tensor

from torchprime.counter_bits import kept, threefry, uniform


def word(value: int) -> Tensor:
    return torch.tensor(value - (1 << 32 if value >= 1 << 31 else 0), dtype=torch.int32)


# kat_vectors of the authors' library Random123, threefry2x32 with 20 rounds.
@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0), (0, 0), (0x6B200159, 0x99BA4EFE)),
        ((0xFFFFFFFF,) * 2, (0xFFFFFFFF,) * 2, (0x1CB996FC, 0xBB002BE7)),
        ((0x243F6A88, 0x85A308D3), (0x13198A2E, 0x03707344), (0xC4923A9C, 0x483DF7A0)),
    ],
)
def test_published_vectors(
    counter: tuple[int, int], key: tuple[int, int], expected: tuple[int, int]
) -> None:
    a, b = threefry((word(key[0]), word(key[1])), (word(counter[0]), word(counter[1])))
    assert (int(a) % 2**32, int(b) % 2**32) == expected


def test_the_bits_are_those_of_jax() -> None:
    rng = np.random.default_rng(0)
    key = rng.integers(0, 2**32, 2, dtype=np.uint32)
    counters = rng.integers(0, 2**32, 2000, dtype=np.uint32)
    expected = np.asarray(threefry_2x32(key, counters))
    halves = [torch.from_numpy(each.view(np.int32).copy()) for each in np.split(counters, 2)]
    words = [torch.tensor(value, dtype=torch.int32) for value in key.view(np.int32)]
    ours = threefry((words[0], words[1]), (halves[0], halves[1]))
    np.testing.assert_array_equal(torch.cat(ours).numpy().view(np.uint32), expected)


def test_a_part_of_the_batch_has_its_part_of_the_mask() -> None:
    key = (word(3), word(0x80000001))
    tokens = torch.arange(40, dtype=torch.int32).view(8, 5)
    whole = kept(key, tokens, 7, 0.3)
    assert whole.shape == (8, 5, 7)
    assert torch.equal(whole[2:6, 1:3], kept(key, tokens[2:6, 1:3], 7, 0.3))


@pytest.mark.parametrize("probability", [0.05, 0.5, 0.9])
def test_the_share_of_dropped_entries(probability: float) -> None:
    mask = kept((word(1), word(2)), torch.arange(4000, dtype=torch.int32), 64, probability)
    n = mask.numel()
    sigma = (probability * (1 - probability) / n) ** 0.5
    assert abs(1 - mask.float().mean().item() - probability) < 4 * sigma
    # Neighbours along both dims are independent.
    for a, b in ((mask[1:], mask[:-1]), (mask[:, 1:], mask[:, :-1])):
        together = (~a & ~b).float().mean().item()
        assert abs(together - probability**2) < 5 * probability / n**0.5


def test_nothing_is_dropped_at_0() -> None:
    assert kept((word(1), word(2)), torch.arange(100, dtype=torch.int32), 64, 0.0).all()


@pytest.mark.parametrize(("first", "width"), [(0, 8), (4, 5), (5, 7), (12, 1)])
def test_a_part_of_each_token_has_the_mask_of_the_whole(first: int, width: int) -> None:
    key = (torch.tensor(7, dtype=torch.int32), torch.tensor(-3, dtype=torch.int32))
    rows = torch.arange(6, dtype=torch.int32).view(2, 3)
    whole = kept(key, rows, 13, 0.4)
    assert torch.equal(kept(key, rows, width, 0.4, first), whole[..., first : first + width])


def test_uniform_numbers_are_the_bits_of_jax_as_fractions() -> None:
    key, tokens, width = (word(5), word(0x90000000)), torch.tensor([3, 900_000]), 6
    found = uniform(key, tokens.int(), width)
    for row, token in enumerate(tokens.tolist()):
        counters = np.array([token] * 3 + [0, 1, 2], dtype=np.uint32)
        words = np.asarray(threefry_2x32(np.array([5, 0x90000000], dtype=np.uint32), counters))
        bits = words.reshape(2, 3).T.reshape(-1)  # both words of each counter side by side
        expected = (bits >> 8).astype(np.float64) / 2**23 - 1
        assert found[row].tolist() == expected.tolist()


def test_uniform_numbers_are_uniform() -> None:
    values = uniform((word(1), word(2)), torch.arange(4000, dtype=torch.int32), 64).double()
    assert values.min() >= -1 and values.max() < 1
    n = values.numel()
    assert abs(values.mean()) < 4 * (1 / 3 / n) ** 0.5
    assert abs(values.square().mean() - 1 / 3) < 4 * (4 / 45 / n) ** 0.5
    counts = torch.histc(values.float(), 20, -1, 1).double()
    assert ((counts - n / 20).square() / (n / 20)).sum() < 50  # chi squared, 19 degrees of freedom
