"""Planning, stopping and sampling, without a model."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from torchprime.errors import ConfigError, DataError
from torchprime.generation.decode import (
    LONGEST_PAIRED,
    Answer,
    Decoding,
    GenerateOptions,
    allowed,
    bucket,
    choose,
    gumbel_noise,
    plan_batches,
    row_lengths,
    sampling_tensors,
)


def options(**changes) -> GenerateOptions:
    given: dict[str, Any] = dict(max_new_tokens=40, stop_ids=(7,), max_length=300, batch_size=4)
    return GenerateOptions(**(given | changes))


# Batches ------------------------------------------------------------------------------------------


def test_buckets_are_few_and_hold_their_prompts() -> None:
    for limit in (40, 64, 300, 2048):
        found = {bucket(length, limit) for length in range(1, limit)}
        assert all(length <= bucket(length, limit) <= limit for length in range(1, limit))
        assert len(found) <= 6, found


@pytest.mark.parametrize(
    ("size", "multiple", "shapes", "fillers"),
    [
        (3, 3, [(3, 64), (3, 128), (3, 300)], 0),  # one row for each device
        (4, 2, [(2, 80), (2, 384), (2, 375)], 3),  # pairs: 1 and 17 tokens, 64 and 200, ...
    ],
)
def test_every_prompt_is_in_one_place(
    size: int, multiple: int, shapes: list[tuple[int, int]], fillers: int
) -> None:
    rng = np.random.default_rng(0)
    prompts = [rng.integers(1, 99, n).tolist() for n in (5, 200, 64, 1, 65, 90, 270, 3, 17)]
    batches = plan_batches(prompts, options(batch_size=size), multiple)
    assert [batch.ids.shape for batch in batches] == shapes
    rows = [int(row) for batch in batches for row in batch.rows]
    assert sorted(row for row in rows if row >= 0) == list(range(9)) and rows.count(-1) == fillers
    for batch in batches:
        in_row, length = len(batch.rows) // len(batch.ids), batch.ids.shape[1]
        used = 0
        for place, (row, (first, count)) in enumerate(zip(batch.rows, batch.spans, strict=True)):
            prompt = prompts[row] if row >= 0 else [0]
            offset = (length - batch.prompt_slots) * (place % in_row)
            ids = batch.ids[place // in_row, offset + first : offset + first + count]
            assert ids.tolist() == prompt and first + count <= batch.prompt_slots
            used += np.count_nonzero(ids)
        assert used == np.count_nonzero(batch.ids)  # no two overlap
        # The first token comes with the prompt, and the last one is followed by none.
        assert batch.chunk * batch.chunks >= 39
        assert batch.slots >= batch.prompt_slots + 39


def test_prompts_are_paired_where_that_saves_slots() -> None:
    """All batches of a bucket have one shape."""
    rng = np.random.default_rng(1)

    def shapes(low: int, high: int) -> set[tuple[int, ...]]:
        prompts = [[1] * n for n in rng.integers(low, high, 320).tolist()]
        return {
            batch.ids.shape
            for batch in plan_batches(prompts, options(batch_size=32, max_length=2048))
        }

    assert shapes(66, 126) == {(16, 208)}
    assert shapes(130, 250) == {(16, 384)}
    assert shapes(200, 250) == {(32, 256)}  # 512 slots for two would save none
    assert shapes(800, 810) == {(16, 1664)}
    assert shapes(1100, 1200) == {(32, 2048)}  # two long prompts have too many scores
    assert all(row_lengths(slots) == [] for slots in (1025, 2048))
    assert shapes(120, 129) == {(32, 128)}
    assert shapes(10, 30) == {(16, 80)}


def test_the_kernel_reads_pairs_where_it_reads_single_prompts() -> None:
    for slots in range(64, LONGEST_PAIRED + 1):
        found = row_lengths(slots)
        assert found == sorted(set(found)) and len(found) <= 2
        assert all(slots <= length <= 7 * slots / 4 for length in found)
        if slots > 128 and slots % 128 == 0:
            assert found and all(length % 128 == 0 for length in found)


@pytest.mark.parametrize("new", [1, 2, 33, 34, 500])
def test_chunks_hold_what_may_follow_and_little_more(new: int) -> None:
    batch = plan_batches([[1, 2]], options(max_new_tokens=new))[0]
    follow = min(new, 299) - 1
    assert follow <= batch.chunk * batch.chunks < follow + 8 * max(batch.chunks, 1)


def test_parts_of_a_batch_are_its_rows() -> None:
    batch = plan_batches([[n] for n in range(1, 5)], options())[0]
    parts = [batch.part(index, 2) for index in range(2)]
    assert batch.ids.shape == (2, 80)
    for field in ("ids", "spans", "rows", "numbers"):
        whole = np.concatenate([getattr(part, field) for part in parts])
        assert np.array_equal(whole, getattr(batch, field))


def test_a_prompt_keeps_its_number_in_every_batch() -> None:
    prompts = [[1] * n for n in (5, 2, 9)]
    for size in (1, 2, 4):
        given = options(batch_size=size, numbers=(7, -(2**31), 2**31 - 1))
        batches = plan_batches(prompts, given)
        pairs = {(int(r), int(n)) for b in batches for r, n in zip(b.rows, b.numbers, strict=True)}
        assert pairs - {(-1, -1)} == {(0, 7), (1, -(2**31)), (2, 2**31 - 1)}
    (batch,) = plan_batches(prompts, options())
    assert np.array_equal(batch.numbers, batch.rows)


def test_few_prompts_make_a_small_batch() -> None:
    assert plan_batches([[1]] * 3, options(batch_size=32))[0].rows.shape == (4,)
    assert plan_batches([], options()) == []


def test_what_is_wrong_is_named() -> None:
    with pytest.raises(DataError, match="Prompt 1 is empty"):
        plan_batches([[1], []], options())
    with pytest.raises(DataError, match="Prompt 2 has 300 tokens.*context of 300.*at most 299"):
        plan_batches([[1], [2], [3] * 300], options())
    assert plan_batches([[3] * 299], options())
    wrong = dict(temperature=-1.0, top_k=0, top_p=0.0, max_new_tokens=0, batch_size=0)
    for name, value in wrong.items():
        with pytest.raises(ConfigError, match=f"{name}: given {value}, expected"):
            options(**{name: value})
    with pytest.raises(ConfigError, match="top_p: given 1.5"):
        options(top_p=1.5)


# Stopping -----------------------------------------------------------------------------------------


def test_rows_end_each_in_its_own_way() -> None:
    prompts = [[1], [1, 2], [1] * 298, [1] * 4]
    given = options(max_new_tokens=3)
    batch = plan_batches(prompts, given)[0]
    decoding = Decoding(batch, prompts, given)
    made = {0: [7, 5, 5, 5], 1: [4, 7, 5, 5], 2: [3, 3, 3, 7], 3: [9, 8, 7, 7]}
    order = [int(row) for row in batch.rows]
    for step in range(4):
        assert bool(decoding.open) == (step < 3)
        decoding.add([[made[row][step] for row in order]])
    assert decoding.found() == {
        0: Answer([], True),
        1: Answer([4], True),
        2: Answer([3, 3], False),  # the context is full
        3: Answer([9, 8], True),  # the stop token is the last that was allowed
    }


# Sampling -----------------------------------------------------------------------------------------


def noise_by_hand(seed: int, row: int, number: int, token: int) -> float:
    """One number at a time, in Python's own integers and double precision."""

    def mixed(x: int) -> int:
        x ^= x >> 16
        x = x * 0x7FEB352D % 2**32
        x ^= x >> 15
        x = x * 0x846CA68B % 2**32
        return x ^ x >> 16

    key = mixed(mixed(mixed(mixed(seed % 2**32) ^ (seed >> 32) % 2**32) ^ row) ^ number)
    bits = mixed(mixed(token ^ 0x51ED270B) ^ key)
    return float(-np.log(-np.log1p(-(bits + 0.5) / 2**32)))


@pytest.mark.parametrize("seed", [0, 3, 2**31, -1, 2**40 + 5])
def test_noise_is_a_function_of_its_place(seed: int) -> None:
    sampling = sampling_tensors(options(seed=seed))
    rows = torch.tensor([4, 0, 2000], dtype=torch.int32)
    found = gumbel_noise(sampling.seed, rows, torch.tensor(17, dtype=torch.int32), 300)
    expected = [[noise_by_hand(seed, int(row), 17, v) for v in range(300)] for row in rows]
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-4, atol=1e-4)


def draws(logits: torch.Tensor, given: GenerateOptions, count: int) -> np.ndarray:
    """Count the draws of each token, over rows and token numbers."""
    sampling = sampling_tensors(given)
    rows = torch.arange(200, dtype=torch.int32)
    chosen = [
        choose(logits.expand(200, -1), given, sampling, rows, torch.tensor(n, dtype=torch.int32))
        for n in range(count // 200)
    ]
    return np.bincount(torch.cat(chosen).numpy(), minlength=logits.shape[-1])


@pytest.mark.parametrize("seed", [0, 1, 12345])
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_draws_follow_the_probabilities(seed: int, temperature: float) -> None:
    """Chi-square of 40,000 draws; the limit is passed by chance once in a million."""
    logits = torch.randn(1, 30, generator=torch.Generator().manual_seed(9))
    count = 40_000
    found = draws(logits, options(temperature=temperature, seed=seed), count)
    expected = torch.softmax(logits[0].double() / temperature, -1).numpy() * count
    chi_square = float(((found - expected) ** 2 / expected).sum())
    assert 6 < chi_square < 80, chi_square  # 29 degrees of freedom
    other = draws(logits, options(temperature=temperature, seed=seed + 1), count)
    assert (found != other).any()


def test_neighbouring_rows_numbers_and_seeds_are_independent() -> None:
    """Correlations of the noise over 100,000 tokens, each within 5 standard deviations of 0."""
    wide = 100_000

    def noise(seed: int, row: int, number: int) -> np.ndarray:
        places = torch.tensor([row], dtype=torch.int32), torch.tensor(number, dtype=torch.int32)
        seeds = sampling_tensors(options(seed=seed)).seed
        return gumbel_noise(seeds, *places, wide)[0].double().numpy()

    first = noise(0, 0, 0)
    assert first.mean() == pytest.approx(0.5772, abs=0.02)
    assert first.var() == pytest.approx(np.pi**2 / 6, abs=0.04)
    for other in ((1, 0, 0), (0, 1, 0), (0, 0, 1), (2**32, 0, 0), (0, 1, 1)):
        assert abs(np.corrcoef(first, noise(*other))[0, 1]) < 5 / wide**0.5, other
    assert abs(np.corrcoef(first[:-1], first[1:])[0, 1]) < 5 / wide**0.5


@pytest.mark.parametrize(
    ("top_k", "top_p", "temperature"),
    [(5, 1.0, 1.0), (None, 0.9, 1.0), (None, 0.3, 0.7), (50, 0.8, 1.3), (1, 0.5, 1.0),
     (1000, 0.999, 2.0), (None, 0.001, 1.0)],
)  # fmt: skip
def test_what_is_kept_is_what_transformers_keeps(top_k, top_p, temperature) -> None:
    g = torch.Generator().manual_seed(4)
    logits = torch.randn(64, 700, generator=g) * torch.linspace(0.1, 12, 64)[:, None]
    given = options(top_k=top_k, top_p=top_p, temperature=temperature)
    sampling = sampling_tensors(given)
    ours = allowed(logits / sampling.temperature, given, sampling)
    no_ids = torch.LongTensor()  # nothing reads them
    theirs = TemperatureLogitsWarper(temperature)(no_ids, logits)
    if top_k is not None:
        theirs = TopKLogitsWarper(top_k)(no_ids, theirs)
    if top_p < 1:
        theirs = TopPLogitsWarper(top_p)(no_ids, theirs)
    kept = torch.isfinite(ours)
    assert torch.equal(kept, torch.isfinite(theirs))
    assert torch.equal(ours[kept], theirs[kept])
    if top_k != 1000:
        assert not kept.all()


def test_ties_are_kept_together() -> None:
    """Tokens of equal probability at the limit are all kept."""
    logits = torch.tensor([[1.0, 3.0, 2.0, 2.0, 2.0, 0.0]])
    given = options(top_k=2, temperature=1.0)
    kept = torch.isfinite(allowed(logits, given, sampling_tensors(given)))
    assert kept.tolist() == [[False, True, True, True, True, False]]


def test_cold_draws_are_greedy() -> None:
    logits = torch.randn(1, 50, generator=torch.Generator().manual_seed(2))
    found = draws(logits, options(temperature=1e-4), 400)
    assert found.argmax() == logits.argmax() and found.max() == 400
