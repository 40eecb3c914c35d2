"""Generation on the host, and the arithmetic that all backends share.

Prompts are sorted by length and cut into batches of equal size. A batch is padded to the smallest
bucket that holds its longest prompt, so that few shapes exist and each is compiled once. If a short
and a long prompt together are clearly shorter than two rows, prompts are read in such pairs, two in
each row. A backend runs prefill for a batch, then decodes tokens in chunks. Between chunks the host
reads the new tokens (`Decoding`) and ends the batch when every row has met a stop token or its
limit.

A sampled token is the argmax of logits / temperature + Gumbel noise. The noise is a hash of (seed,
the prompt's number, the token's number, the vocabulary id). So a prompt's answer does not depend on
its batch, the mesh or the backend, up to rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from torchprime.attention_kernels.blocks import KERNEL_MULTIPLE
from torchprime.counter_bits import shifted_right
from torchprime.errors import ConfigError, DataError

SMALLEST_BUCKET = 64
# Two prompts are read in one row of so many eighths of their bucket. Attention's scores grow with
# the square of a row, so prompts of longer buckets are read alone.
PAIRED_EIGHTHS = (10, 13)
LONGEST_PAIRED = 1024
# Tokens per traced program. With more, more would be discarded after a batch's last stop token.
CHUNK = 32
# Halvings of the interval that a threshold lies in: from the spread of logits to less than one's
# last bit.
HALVINGS = 40
FILLER = -1  # instead of a prompt's number, in a row that holds one token
SALT = 0x51ED270B

# Shape suffixes: B batch, V vocab.


class Answer(NamedTuple):
    """The answer to a prompt."""

    ids: list[int]  # without the stop token
    stopped: bool  # by a stop token; else by a limit


@dataclass(frozen=True, kw_only=True)
class GenerateOptions:
    """Options of generation.

    Attributes:
        max_new_tokens: the limit of tokens, including the stop token.
        stop_ids: tokens that end an answer; may be empty.
        max_length: the model's context: a prompt and its answer are never longer.
        temperature: 0 takes the most likely token.
        top_k: sample among the k most likely; None for all.
        top_p: sample among the smallest set of tokens with this total probability.
        numbers: int32 numbers, one for each prompt, for the noise of sampling; None for the
            prompts' places in the call.
        batch_size: prompts per batch, over all devices.
    """

    max_new_tokens: int
    stop_ids: tuple[int, ...]
    max_length: int
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    seed: int = 0
    numbers: tuple[int, ...] | None = None
    batch_size: int = 32

    def __post_init__(self) -> None:
        checks = {
            "max_new_tokens": (self.max_new_tokens >= 1, "1 or more"),
            "max_length": (self.max_length >= 2, "2 or more"),
            "temperature": (0 <= self.temperature < float("inf"), "0 (greedy) or more"),
            "top_k": (self.top_k is None or self.top_k >= 1, "1 or more, or none"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "batch_size": (self.batch_size >= 1, "1 or more"),
            "seed": (-(2**63) <= self.seed < 2**63, "a 64-bit integer"),
        }
        for name, (fine, expected) in checks.items():
            if not fine:
                raise ConfigError(f"{name}: given {getattr(self, name)}, expected {expected}.")

    @property
    def sampled(self) -> bool:
        """True if tokens are sampled, False if the most likely one is taken."""
        return self.temperature > 0

    @property
    def choice(self) -> tuple[bool, bool, bool]:
        """The options that `choose` reads: if they are equal, so is the compiled program."""
        return self.sampled, self.top_k is not None, self.top_p < 1

    def room(self, prompt: Sequence[int]) -> int:
        """Return the number of tokens that may follow a prompt."""
        return min(self.max_new_tokens, self.max_length - len(prompt))


# Batches ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PromptBatch:
    """Prompts that are answered together; rows after the last prompt are fillers.

    Attributes:
        ids: int32 [B, prompt_slots], each prompt at the right end of its row; or [B / 2, S], the
            prompts 2 r and 2 r + 1 at the left and the right end of row r.
        spans: int32 [B, 2], a prompt's first slot in the cache and its number of tokens.
        rows: int32 [B], the prompts' places in the call; -1 for fillers.
        numbers: int32 [B], the prompts' numbers in the noise; -1 for fillers.
        prompt_slots: the cache slots of a prompt.
        chunk: tokens of a program.
        chunks: such programs that may follow the first token.
    """

    ids: npt.NDArray[np.int32]
    spans: npt.NDArray[np.int32]
    rows: npt.NDArray[np.int32]
    numbers: npt.NDArray[np.int32]
    prompt_slots: int
    chunk: int
    chunks: int

    @property
    def slots(self) -> int:
        """The number of cache slots: the prompt's, and one for every new token but the last."""
        return self.prompt_slots + self.chunk * self.chunks

    def part(self, index: int, count: int) -> PromptBatch:
        """Return the rows of one of `count` parts."""

        def cut(field: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
            size = len(field) // count
            return field[index * size : (index + 1) * size]

        names = ("ids", "spans", "rows", "numbers")
        return replace(self, **{name: cut(getattr(self, name)) for name in names})


def plan_batches(
    prompts: Sequence[Sequence[int]], options: GenerateOptions, multiple: int = 1
) -> list[PromptBatch]:
    """Cut a call's prompts into batches.

    Args:
        prompts: token ids; every process gives the same.
        multiple: the batch's size is rounded up to a multiple of it.

    Raises:
        DataError: a prompt that is empty or leaves no room for an answer.
    """
    _check_prompts(prompts, options)
    if not prompts:
        return []
    # A handful of prompts does not fill a large batch; powers of two limit the number of shapes.
    wanted = min(options.batch_size, _power_of_two(len(prompts)))
    size = -(-wanted // multiple) * multiple
    lengths = [*map(len, prompts), 1]  # the last one is FILLER's
    order = sorted(range(len(prompts)), key=lengths.__getitem__)
    order += [FILLER] * (-len(order) % size)
    by_slots: dict[int, list[int]] = {}
    for start in range(0, len(order), size):
        numbers = order[start : start + size]
        slots = bucket(max(lengths[n] for n in numbers), options.max_length)
        by_slots.setdefault(slots, []).extend(numbers)
    batches = []
    for slots, numbers in by_slots.items():
        layout = _Layout(numbers, slots, slots)
        if size % (2 * multiple) == 0:
            layout = _paired(layout, lengths)
        batches += [
            _batch(prompts, layout, slice(start, start + size), options)
            for start in range(0, len(numbers), size)
        ]
    return batches


def _check_prompts(prompts: Sequence[Sequence[int]], options: GenerateOptions) -> None:
    for number, prompt in enumerate(prompts):
        if not prompt:
            raise DataError(f"Prompt {number} is empty; a prompt needs at least one token.")
        if options.room(prompt) < 1:
            raise DataError(
                f"Prompt {number} has {len(prompt)} tokens, which leaves no room for an answer in "
                f"the context of {options.max_length}. Give at most {options.max_length - 1}."
            )


class _Layout(NamedTuple):
    """The order of prompts in batches, and their places in the rows that are read."""

    numbers: list[int]  # prompts and fillers, batch by batch
    slots: int  # of a prompt in the cache
    length: int  # of a row that is read

    @property
    def in_row(self) -> int:
        """The number of prompts in a row: one fills its slots, and two need more."""
        return 1 if self.length == self.slots else 2


def _paired(layout: _Layout, lengths: Sequence[int]) -> _Layout:
    """Put a long and a short prompt into each row, if all of them fit into one of the lengths of
    `row_lengths`."""
    every = sorted(layout.numbers, key=lengths.__getitem__)
    half = len(every) // 2
    pairs = list(zip(every[:half], reversed(every[half:]), strict=True))
    longest = max(lengths[left] + lengths[right] for left, right in pairs)
    for length in row_lengths(layout.slots):
        if longest <= length:
            return _Layout([n for pair in pairs for n in pair], layout.slots, length)
    return layout


def row_lengths(slots: int) -> list[int]:
    """Return the lengths of rows for two prompts of a bucket, the shortest first: at most two, so
    that few shapes exist. Each saves an eighth or more of two rows.

    Above 128 slots, they allow the attention kernel of TPUs if the bucket does. For shorter ones it
    does not matter.
    """
    if slots > LONGEST_PAIRED:
        return []
    lengths = [-(-slots * eighths // 8) for eighths in PAIRED_EIGHTHS]
    if slots > KERNEL_MULTIPLE and slots % KERNEL_MULTIPLE == 0:
        lengths = [length + -length % KERNEL_MULTIPLE for length in lengths]
    return [length for length in lengths if 8 * length <= 7 * (2 * slots)]


def _batch(
    prompts: Sequence[Sequence[int]], layout: _Layout, part: slice, options: GenerateOptions
) -> PromptBatch:
    numbers, slots, length = layout
    rows = np.array(numbers[part], np.int32)
    ids = np.zeros((len(rows) // layout.in_row, length), np.int32)
    spans, drawn = np.zeros((len(rows), 2), np.int32), np.full(len(rows), -1, np.int32)
    for row, number in enumerate(rows.tolist()):
        prompt: Sequence[int] = [0]
        if number != FILLER:
            prompt = prompts[number]
            drawn[row] = number if options.numbers is None else options.numbers[number]
        count = len(prompt)
        at_left = layout.in_row == 2 and row % 2 == 0
        end = count if at_left else length
        ids[row // layout.in_row, end - count : end] = prompt
        spans[row] = 0 if at_left else slots - count, count
    return PromptBatch(ids, spans, rows, drawn, slots, *_chunks(options))


def _chunks(options: GenerateOptions) -> tuple[int, int]:
    """Return the tokens of a program, and how many such programs may follow the first token."""
    follow = min(options.max_new_tokens, options.max_length - 1) - 1
    chunks = -(-follow // CHUNK)
    return (-(-follow // (8 * chunks)) * 8 if chunks else 0), chunks


def bucket(length: int, limit: int) -> int:
    """Return the slots that a prompt of this length is padded to: a power of two from 64 on, or the
    limit.

    Examples:
        >>> [bucket(length, 300) for length in (1, 64, 65, 200, 257)]
        [64, 64, 128, 256, 300]
    """
    return max(length, min(limit, max(SMALLEST_BUCKET, _power_of_two(length))))


def _power_of_two(value: int) -> int:
    return 1 << (value - 1).bit_length()


class Decoding:
    """A batch's answers while they grow, on the host."""

    def __init__(
        self, batch: PromptBatch, prompts: Sequence[Sequence[int]], options: GenerateOptions
    ) -> None:
        self.rows = batch.rows.tolist()
        self.answers: dict[int, list[int]] = {row: [] for row in self.rows if row >= 0}
        self.open = {row: options.room(prompts[row]) for row in self.answers}
        self.stopped: set[int] = set()
        self.stops = frozenset(options.stop_ids)

    def add(self, tokens: Sequence[Sequence[int]]) -> None:
        """Add the new tokens of all rows of the batch, in the order of time."""
        for made in tokens:
            for row, token in zip(self.rows, made, strict=True):
                if row not in self.open:
                    continue
                if token in self.stops:
                    self.stopped.add(row)
                    del self.open[row]
                    continue
                self.answers[row].append(token)
                if len(self.answers[row]) == self.open[row]:
                    del self.open[row]

    def found(self) -> dict[int, Answer]:
        """Return the answers by the prompts' indexes in the call."""
        return {row: Answer(ids, row in self.stopped) for row, ids in self.answers.items()}


# Choosing a token ---------------------------------------------------------------------------------


class Sampling(NamedTuple):
    """The inputs of sampling as scalar tensors on the device, so that none is a constant in the
    program."""

    seed: Tensor  # int32 [2], the low and the high half
    temperature: Tensor  # fp32
    top_k: Tensor  # fp32
    top_p: Tensor  # fp32


def sampling_tensors(options: GenerateOptions) -> Sampling:
    """Return the sampling tensors, on the CPU."""
    halves = np.array([options.seed], np.int64).view(np.int32)
    return Sampling(
        torch.from_numpy(halves),
        torch.tensor(options.temperature, dtype=torch.float32),
        torch.tensor(float(options.top_k or 0)),
        torch.tensor(options.top_p, dtype=torch.float32),
    )


def choose(
    logits: Tensor, options: GenerateOptions, sampling: Sampling, rows: Tensor, number: Tensor
) -> Tensor:
    """Return the next token of each row.

    Args:
        logits: fp32 [B, V].
        options: of which only `choice` is read, the numbers are in `sampling`.
        rows: int32 [B], the prompts' numbers.
        number: int32 scalar, how many tokens were made before.

    Returns:
        int32 [B].
    """
    if options.sampled:
        logits = allowed(logits / sampling.temperature, options, sampling)
        logits = logits + gumbel_noise(sampling.seed, rows, number, logits.shape[1])
    return torch.argmax(logits, dim=-1).to(torch.int32)


def allowed(logits: Tensor, options: GenerateOptions, sampling: Sampling) -> Tensor:
    """Replace the logits that top_k and then top_p leave out by -inf, in transformers' order.
    Tokens as likely as the last one that is kept are kept too."""
    if options.top_k is not None:
        counts = torch.ones_like(logits)
        logits = _cut(logits, _threshold(logits, counts, sampling.top_k))
    if options.top_p < 1:
        shares = torch.softmax(logits, dim=-1)
        logits = _cut(logits, _threshold(logits, shares, sampling.top_p))
    return logits


def _cut(logits: Tensor, threshold: Tensor) -> Tensor:
    return torch.where(logits >= threshold, logits, float("-inf"))


def _threshold(logits: Tensor, weights: Tensor, target: Tensor) -> Tensor:
    """Return the largest value [B, 1] such that logits from it on weigh `target` or more together.

    It is found by halving the interval until it is as narrow as two neighbouring numbers: a sort of
    a large vocabulary takes longer on every device.
    """
    high = logits.amax(-1, keepdim=True)
    low = torch.where(torch.isinf(logits), high, logits).amin(-1, keepdim=True)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        weight = torch.where(logits >= middle, weights, 0.0).sum(-1, keepdim=True)
        enough = weight >= target
        low, high = torch.where(enough, middle, low), torch.where(enough, high, middle)
    return low


def gumbel_noise(seed: Tensor, rows: Tensor, number: Tensor, vocabulary: int) -> Tensor:
    """Return independent Gumbel noise, fp32 [B, V], a pure function of its arguments."""
    key = _mixed(_mixed(seed[0]) ^ seed[1])
    key = _mixed(_mixed(key ^ rows) ^ number)
    ids = torch.arange(vocabulary, dtype=torch.int32, device=rows.device)
    bits = _mixed(_mixed(ids ^ SALT) ^ key[:, None])
    # The small values matter most: there the noise is largest, and a float most precise.
    unsigned = bits.to(torch.float32)
    unsigned = torch.where(bits < 0, unsigned + 2.0**32, unsigned)
    uniform = ((unsigned + 0.5) * 2.0**-32).clamp(max=1 - 2.0**-24)
    return -torch.log(-torch.log1p(-uniform))


def _mixed(x: Tensor) -> Tensor:
    """Return a bijection of 32 bits in which every input bit flips about half of the output's
    bits."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B - 2**32), (16, None)):
        x = x ^ shifted_right(x, shift)
        x = x if factor is None else x * factor
    return x
