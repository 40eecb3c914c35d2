"""Rows that are in train and in eval, word for word or nearly, and rows repeated inside train.

    texts -> normalized -> shingles -> MinHash signatures -> bands that rows share -> candidates
          -> exact Jaccard of the candidates' shingle sets -> pairs and clusters

Two rows are exact duplicates when their normalized texts are equal, and near-duplicates when the
Jaccard similarity of their sets of shingles reaches the threshold. MinHash and LSH (datasketch)
only propose pairs: what is reported was compared shingle by shingle. So the report has no false
pair, and misses a pair at the threshold with the probability 1 - `lsh_recall`: at the default
threshold of 0.8, 5% at exactly 0.8, 0.6% at 0.85 and 0.01% at 0.9.

Shingles that more than 2% of the rows contain (a system prompt, the frame of a template) are left
out of the sets, else rows would be alike for what is the same in all of them.

The rows are read up to three times and never kept: a sample for the frequent shingles, all for the
signatures (512 bytes a row), and the texts of candidates for the comparison. Groups that are on
both sides are found on the way.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import re
import time
import unicodedata
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import chain, islice
from typing import Any, NamedTuple

import numpy as np
from datasketch import MinHash, MinHashLSH

from torchprime.errors import ConfigError, DataError

TextRow = tuple[str, str, "str | None"]  # row id, text, group

SHINGLE = 5  # words, or characters where a script has no spaces
NUM_PERM = 128
SHOWN_PAIRS, SHOWN_CLUSTERS, SHOWN_IDS, SHOWN_CHARS = 1000, 20, 10, 80
CHUNK_ROWS, PARALLEL_FROM = 2000, 20_000
# A shingle is frequent when more than this share of the rows, and this many rows, contain it.
FREQUENT_SHARE, FREQUENT_ROWS = 0.02, 100
SAMPLE_SHINGLES = 1_000_000
# No row is compared with many more others than this: pairs grow with the square of a family.
MAX_CANDIDATES = 300
_CACHED_WORDS = 500_000
_SCHEME = "affine32"  # datasketch's 32-bit permutations

# Scripts written without spaces between words: Thai, Lao, Burmese, Khmer, kana and Han.
_SPACELESS = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\U00020000-\U0003ffff]"
)
# Between digits these are arithmetic, without which 7-2 and 7/2 were one problem. As mathematical
# symbols they survive the removal of punctuation.
_OPERATORS = {"-": "\u2212", "*": "\u00d7", "/": "\u00f7", ".": "\u22c5"}
_BETWEEN_DIGITS = re.compile(r"(?<=\d)(?:\s*([-*/])\s*|(\.))(?=\d)")
_SIGN = re.compile(r"(?<![\w)])-(?=\d)")
_PERCENT = re.compile(r"(?<=\d)\s?%")


@dataclass(frozen=True)
class LeakPair:
    """A train row and an eval row that are the same, and the first characters of both."""

    train_id: str
    eval_id: str
    similarity: float  # 1.0 for exact pairs, and for near pairs with equal shingle sets
    exact: bool
    train_text: str
    eval_text: str


@dataclass(frozen=True)
class Cluster:
    """Rows of train that are duplicates of each other, directly or through others."""

    num_rows: int
    exact: bool  # all of them have the same normalized text
    row_ids: list[str]  # the first ones
    text: str


@dataclass(frozen=True)
class LeakReport:
    """What was found. Counts are of all; pairs, clusters and groups list the first or largest.

    `crowded_rows` have so many look-alikes that not all of them were compared.
    """

    threshold: float
    num_perm: int
    recall_at_threshold: float
    train_rows: int
    eval_rows: int
    exact_pairs: int
    near_pairs: int
    leaked_train_rows: int  # train rows in a pair; without them there is no leak
    leaked_eval_rows: int
    num_shared_groups: int
    exact_duplicate_rows: int  # rows of train whose normalized text is there more than once
    exact_extra_rows: int  # how many of them are too many
    near_duplicate_rows: int  # rows of train in a cluster of different but similar texts
    num_near_clusters: int
    frequent_shingles: int
    crowded_rows: int
    seconds: float
    pairs: list[LeakPair] = field(default_factory=list)
    shared_groups: list[str] = field(default_factory=list)
    clusters: list[Cluster] = field(default_factory=list)

    @property
    def leaks(self) -> bool:
        """Whether anything of eval is in train: a row, or a group."""
        return bool(self.leaked_eval_rows or self.num_shared_groups)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> LeakReport:
        """What `to_dict` made."""
        pairs = [LeakPair(**pair) for pair in content["pairs"]]
        clusters = [Cluster(**cluster) for cluster in content["clusters"]]
        return cls(**{**content, "pairs": pairs, "clusters": clusters})

    def summary(self) -> str:
        """One line for the log."""
        parts = [
            f"{self.leaked_eval_rows:,} of {self.eval_rows:,} eval rows are in train "
            f"({self.exact_pairs:,} exact pairs, {self.near_pairs:,} near pairs at Jaccard >= "
            f"{self.threshold:g}, {self.leaked_train_rows:,} of {self.train_rows:,} train rows)",
            f"inside train {self.exact_duplicate_rows:,} rows are in exact clusters "
            f"({self.exact_extra_rows:,} too many) and {self.near_duplicate_rows:,} in "
            f"{self.num_near_clusters:,} near clusters",
        ]
        if self.num_shared_groups:
            names = ", ".join(self.shared_groups[:3])
            parts.append(f"{self.num_shared_groups:,} groups on both sides ({names})")
        if self.crowded_rows:
            parts.append(f"{self.crowded_rows:,} rows with too many look-alikes to compare all")
        return "; ".join([*parts, f"{self.seconds:.1f} s"])


def find_leaks(
    train: Iterable[TextRow],
    evaluation: Iterable[TextRow],
    *,
    threshold: float = 0.8,
    num_perm: int = NUM_PERM,
    workers: int = 2,
    seed: int = 0,
) -> LeakReport:
    """Compare eval with train and train with itself. The result does not depend on `workers`.

    Args:
        train, evaluation: (row id, text, group or None), iterable three times with the same
            result: a list or an object with __iter__, not a generator.
        threshold: Jaccard similarity from which rows are near-duplicates, in (0, 1].
        num_perm: length of a signature; twice the length needs twice the memory.
        workers: processes for the signatures, used from PARALLEL_FROM rows on.
        seed: of the permutations; changes which pairs are missed.

    Raises:
        ConfigError: a threshold outside of (0, 1], or too few permutations.
        DataError: the rows were others when they were read again.
        TypeError: a generator or another one-time iterator.
    """
    if not 0 < threshold <= 1:
        raise ConfigError(
            f"the leak check's threshold={threshold} is not a Jaccard similarity, expected a "
            f"number in (0, 1], e.g. 0.8"
        )
    if num_perm < 16:
        raise ConfigError(f"the leak check's num_perm={num_perm} is too few, expected 16 or more")
    for name, rows in (("train", train), ("evaluation", evaluation)):
        if iter(rows) is rows:
            raise TypeError(f"{name} can be read only once: give a list or an iterable object")
    return _Check(train, evaluation, threshold, num_perm, max(1, workers), seed).run()


def bands_for(threshold: float, num_perm: int) -> tuple[int, int]:
    """How many bands of how many values: the longest bands with a recall of 0.9 at the threshold.

    Longer bands propose fewer unlike pairs; exact comparison of what they propose is cheap, so
    that recall comes first.
    """
    fitting = [
        (num_perm // size, size)
        for size in range(1, num_perm // 2 + 1)
        if lsh_recall(threshold, num_perm // size, size) >= 0.9
    ]
    return max(fitting, key=lambda bands: bands[1], default=(num_perm, 1))


def lsh_recall(similarity: float, bands: int, size: int) -> float:
    """The probability that a pair of this Jaccard similarity is proposed."""
    return 1 - (1 - similarity**size) ** bands


# Texts to shingles


class _Plain(dict[int, "str | None"]):
    """What each character becomes: itself, a space, nothing, or a word of its own."""

    def __missing__(self, code: int) -> str | None:
        category = unicodedata.category(chr(code))
        if category == "Cf":  # soft hyphens, joiners, marks of direction: not to be seen
            plain = None
        elif category[0] in "PZ" or category in ("Cc", "Sk"):
            plain = " "
        else:
            plain = f" {chr(code)} " if category[0] == "S" else chr(code)
        self[code] = plain
        return plain


_PLAIN = _Plain()


def normalize(text: str) -> str:
    """Letters, digits and symbols, so that case, spacing and punctuation make no difference.

    NFKC and case folding; punctuation and controls become spaces; symbols (+, =, $, emoji) are
    words of their own, as are -, *, / and the point between digits, a sign and a percentage.
    """
    text = unicodedata.normalize("NFKC", text).casefold()
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text)  # folding can leave what NFKC composes
    text = _BETWEEN_DIGITS.sub(lambda found: _OPERATORS[found[1] or found[2]], text)
    text = _PERCENT.sub(" percent ", _SIGN.sub(_OPERATORS["-"], text))
    return " ".join(text.translate(_PLAIN).split())


def shingle_units(normalized: str) -> list[str]:
    """What shingles are made of: words, or characters where spaces do not separate words.

    Characters are taken when 3 in 10 are of a script written without spaces, or when there are
    more than 20 to a word.
    """
    words = normalized.split()
    joined = normalized.replace(" ", "")
    if len(joined) > 20 * len(words):
        return list(joined)
    if not joined.isascii() and len(_SPACELESS.findall(joined)) >= 0.3 * len(joined):
        return list(joined)
    return words


def _hash(text: str) -> int:
    """64 bits, the same in every process."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little")


class _UnitHashes(dict[str, int]):
    """The hashes of the words met so far. Emptied when there are too many."""

    def __missing__(self, unit: str) -> int:
        value = self[unit] = _hash(unit)
        return value


_UNIT_HASHES = _UnitHashes()


class _Shingles(NamedTuple):
    """The shingles of some rows, one after the other; those of row i begin at starts[i]."""

    keys: np.ndarray  # uint64 [rows]: equal for rows with equal normalized texts
    values: np.ndarray  # uint64 [shingles]
    starts: np.ndarray  # int64 [rows + 1]

    def sets(self) -> list[np.ndarray]:
        """Each row's set of shingles, sorted."""
        return [np.unique(part) for part in np.split(self.values, self.starts[1:-1])]


def shingle(texts: list[str], frequent: np.ndarray) -> _Shingles:
    """Hash every run of SHINGLE units of each text, or the whole text where it is shorter.

    Args:
        frequent: sorted uint64, shingles to leave out, except in rows that have no others.
    """
    plain = [normalize(text) for text in texts]
    units = [shingle_units(text) for text in plain]
    if len(_UNIT_HASHES) > _CACHED_WORDS:
        _UNIT_HASHES.clear()
    hashes = np.fromiter(map(_UNIT_HASHES.__getitem__, chain.from_iterable(units)), np.uint64)
    # A text of symbols that vanish is compared as it stands; two such are not always the same.
    keys = [_hash(p or "\0" + t) for p, t in zip(plain, texts, strict=True)]
    lengths = np.fromiter(map(len, units), np.int64, len(units))
    values, starts = _runs(hashes, lengths)
    if len(frequent):
        values, starts = _without(values, starts, frequent)
    return _Shingles(np.array(keys, np.uint64), values, starts)


def _runs(hashes: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """One hash for every SHINGLE hashes on end of a row; a shorter row is filled up with 0."""
    padded = np.where(lengths > 0, np.maximum(lengths, SHINGLE), 0)
    begins = np.cumsum(padded) - padded  # of the rows in the filled-up array
    line = np.zeros(padded.sum() + SHINGLE, np.uint64)
    shifts = begins - (np.cumsum(lengths) - lengths)
    line[np.arange(len(hashes)) + np.repeat(shifts, lengths)] = hashes
    mixed = np.zeros(padded.sum(), np.uint64)
    for i in range(SHINGLE):  # order matters: every place has another factor
        mixed = mixed * np.uint64(0x9E3779B97F4A7C15) + line[i : i + len(mixed)]
    counts = np.where(padded > 0, padded - SHINGLE + 1, 0)
    starts = np.concatenate([[0], np.cumsum(counts)])
    places = np.arange(starts[-1]) + np.repeat(begins - starts[:-1], counts)
    return _mix(mixed[places]), starts


def _without(
    values: np.ndarray, starts: np.ndarray, frequent: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Leave out frequent shingles, except in rows that have no others."""
    counts = np.diff(starts)
    rows = np.repeat(np.arange(len(counts)), counts)
    kept = frequent[np.searchsorted(frequent, values).clip(max=len(frequent) - 1)] != values
    bare = np.bincount(rows[kept], minlength=len(counts)) == 0
    kept |= bare[rows]
    left = np.bincount(rows[kept], minlength=len(counts))
    return values[kept], np.concatenate([[0], np.cumsum(left)])


def _mix(values: np.ndarray) -> np.ndarray:
    """Spread every bit of a uint64 over all of them, reversibly (MurmurHash3's last step)."""
    for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        values = (values ^ (values >> np.uint64(33))) * np.uint64(factor)
    return values ^ (values >> np.uint64(33))


def frequent_shingles(rows: Iterable[TextRow]) -> np.ndarray:
    """Shingles that more than FREQUENT_SHARE of the different texts contain, sorted uint64.

    Counted on every row, or of many on a half, a quarter, ... that their places draw, scattered:
    every 4th row of sources that take turns would be of one source.
    """
    share, sample = 1, dict[int, tuple[int, np.ndarray]]()  # by key: a repeated row counts once
    nothing = np.empty(0, np.uint64)
    for first, chunk in _chunks(rows):
        draws = _mix(np.arange(first + 1, first + 1 + len(chunk), dtype=np.uint64)).tolist()
        drawn = [(d, row[1]) for d, row in zip(draws, chunk, strict=True) if d % share == 0]
        found = shingle([text for _, text in drawn], nothing)
        for key, values, (draw, _) in zip(found.keys.tolist(), found.sets(), drawn, strict=True):
            sample.setdefault(key, (draw, values))
        while len(sample) > FREQUENT_ROWS and _num_shingles(sample) > SAMPLE_SHINGLES:
            share *= 2
            sample = {key: item for key, item in sample.items() if item[0] % share == 0}
    if len(sample) <= FREQUENT_ROWS:
        return nothing
    every = np.concatenate([values for _, values in sample.values()])
    values, counts = np.unique(every, return_counts=True)
    return values[counts > max(FREQUENT_ROWS, FREQUENT_SHARE * len(sample))]


def _num_shingles(sample: dict[int, tuple[int, np.ndarray]]) -> int:
    return sum(len(values) for _, values in sample.values())


# Shingles to signatures


class _Signer:
    """MinHash signatures of many rows at once; the values are those of datasketch's MinHash."""

    def __init__(self, num_perm: int, seed: int, frequent: np.ndarray) -> None:
        self.frequent = frequent
        self.permutations = np.asarray(MinHash(num_perm, seed, scheme=_SCHEME).permutations)

    def sign(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Keys, uint64 [rows], and signatures, uint32 [rows, num_perm]; all bits set for none."""
        found = shingle(texts, self.frequent)
        hashes = _mix32(to_32_bits(found.values))
        full = np.flatnonzero(np.diff(found.starts))
        signatures = np.full((len(texts), len(self.permutations[0])), 0xFFFFFFFF, np.uint32)
        if len(full):
            # By permutation and not by row: each pass is over an array that stays in the cache.
            columns = np.empty((signatures.shape[1], len(full)), np.uint32)
            for column, a, b in zip(columns, *self.permutations, strict=True):
                np.minimum.reduceat(hashes * a + b, found.starts[:-1][full], out=column)
            signatures[full] = columns.T
        return found.keys, signatures


def to_32_bits(values: np.ndarray) -> np.ndarray:
    """What a 64-bit shingle is to MinHash."""
    return (values >> np.uint64(32)).astype(np.uint32)


def _mix32(values: np.ndarray) -> np.ndarray:
    """As datasketch prepares 32-bit hashes for its permutations (MurmurHash3's last step)."""
    values = (values ^ (values >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    values = (values ^ (values >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return values ^ (values >> np.uint32(16))


_worker: list[_Signer] = []  # in a worker process, its only one


def _start_worker(num_perm: int, seed: int, frequent: np.ndarray) -> None:
    _worker[:] = [_Signer(num_perm, seed, frequent)]


def _sign_in_worker(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    return _worker[0].sign(texts)


def _chunks(rows: Iterable[TextRow]) -> Iterator[tuple[int, list[TextRow]]]:
    """The rows in lists of CHUNK_ROWS, with the place of each list's first row."""
    iterator, first = iter(rows), 0
    while chunk := list(islice(iterator, CHUNK_ROWS)):
        yield first, chunk
        first += len(chunk)


# Signatures to pairs


class _Clusters:
    """Which texts belong together, by the pairs joined so far (union-find)."""

    def __init__(self, size: int) -> None:
        self.parents = list(range(size))

    def find(self, item: int) -> int:
        while self.parents[item] != item:
            self.parents[item] = item = self.parents[self.parents[item]]
        return item

    def join(self, one: int, other: int) -> None:
        first, second = sorted((self.find(one), self.find(other)))
        self.parents[second] = first

    def families(self) -> dict[int, list[int]]:
        """The clusters of two and more, each under its first member."""
        found: dict[int, list[int]] = {}
        for item, parent in enumerate(self.parents):
            if parent != item:
                first = self.find(item)
                found.setdefault(first, [first]).append(item)
        return found


class _Side:
    """One side's rows: ids, and for each row which of the different texts it has."""

    def __init__(self, name: str, rows: Iterable[TextRow]) -> None:
        self.name, self.rows = name, rows
        self.ids: list[str] = []
        self.text_of = np.empty(0, np.int64)  # [rows]
        self.counts = np.empty(0, np.int64)  # [texts]: rows with this text
        self.heads: dict[int, str] = {}  # first characters of the rows that may be shown
        self._by_text: np.ndarray | None = None

    def again(self) -> Iterator[tuple[int, list[TextRow]]]:
        """The rows in chunks, once more, and the assurance that they are the same rows."""
        total = 0
        for first, chunk in _chunks(self.rows):
            total = first + len(chunk)
            if [row[0] for row in chunk] != self.ids[first:total]:
                break
            yield first, chunk
        else:
            if total == len(self.ids):
                return
        raise DataError(
            f"the {self.name} rows were others when the leak check read them again: before, they "
            f"were {len(self.ids):,}. Don't change the files during a run"
        )

    def rows_with(self, text: int) -> np.ndarray:
        """The places of the rows with this text, in order."""
        if self._by_text is None:
            self._by_text = np.argsort(self.text_of, kind="stable")
            self._ends = np.cumsum(self.counts)
        end = self._ends[text]
        return self._by_text[end - self.counts[text] : end]


class _Check:
    """One run of find_leaks. A "text" is a number: rows with equal normalized texts share it."""

    def __init__(
        self,
        train: Iterable[TextRow],
        evaluation: Iterable[TextRow],
        threshold: float,
        num_perm: int,
        workers: int,
        seed: int,
    ) -> None:
        self.train, self.eval = _Side("train", train), _Side("eval", evaluation)
        self.threshold, self.num_perm, self.workers = threshold, num_perm, workers
        self.seed = seed
        self.bands, self.band_size = bands_for(threshold, num_perm)
        self.signatures = np.empty((0, num_perm), np.uint32)  # [rows, num_perm]
        self.firsts = np.empty(0, np.int64)  # [texts]: the first row with this text
        self.crowded = 0

    def run(self) -> LeakReport:
        started = time.perf_counter()
        samples = [frequent_shingles(side.rows) for side in (self.train, self.eval)]
        self.frequent = np.union1d(*samples)
        self.signer = _Signer(self.num_perm, self.seed, self.frequent)
        shared_groups = self._sign()
        candidates = self._candidates()
        sets = self._read_again(candidates)
        near, clusters = self._compare(candidates, sets)
        return self._report(near, clusters, shared_groups, started)

    def _sign(self) -> list[str]:
        """Fill the sides and the signatures. Returns the groups that are on both sides."""
        keys, rows = [np.empty(0, np.uint64)], 0
        groups: dict[str, set[str]] = {"train": set(), "eval": set()}
        for side in (self.train, self.eval):
            for chunk_keys, signatures in self._signed(side, groups[side.name]):
                start, rows = rows, rows + len(chunk_keys)
                if rows > len(self.signatures):
                    # In place: a copy would need the memory twice.
                    size = max(rows, len(self.signatures) * 9 // 8)
                    self.signatures.resize((size, self.num_perm), refcheck=False)
                self.signatures[start:rows] = signatures
                keys.append(chunk_keys)
        self.signatures.resize((rows, self.num_perm), refcheck=False)
        _, firsts, text_of = np.unique(np.concatenate(keys), return_index=True, return_inverse=True)
        # Numbered in the order of their first rows, train's before eval's.
        order = np.argsort(firsts)
        numbers = np.empty_like(order)
        numbers[order] = np.arange(len(order))
        self.firsts, text_of = firsts[order], numbers[text_of]
        self.train.text_of, self.eval.text_of = np.split(text_of, [len(self.train.ids)])
        for side in (self.train, self.eval):
            side.counts = np.bincount(side.text_of, minlength=len(order))
        return sorted(groups["train"] & groups["eval"])

    def _signed(self, side: _Side, groups: set[str]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Keys and signatures, chunk by chunk in order, noting ids and groups on the way."""

        def texts() -> Iterator[list[str]]:
            for _, chunk in _chunks(side.rows):
                side.ids.extend(row_id for row_id, _, _ in chunk)
                groups.update(group for _, _, group in chunk if group is not None)
                yield [text for _, text, _ in chunk]

        chunks = texts()
        # Few rows are signed before a process has started.
        alone = PARALLEL_FROM // CHUNK_ROWS if self.workers > 1 else None
        yield from map(self.signer.sign, islice(chunks, alone))
        first = next(chunks, None)
        if first is None:
            return
        pending: deque[Future[tuple[np.ndarray, np.ndarray]]] = deque()
        with ProcessPoolExecutor(
            self.workers,
            mp_context=multiprocessing.get_context("spawn"),  # a fork would copy XLA's threads
            initializer=_start_worker,
            initargs=(self.num_perm, self.seed, self.frequent),
        ) as pool:
            for chunk in chain([first], chunks):
                pending.append(pool.submit(_sign_in_worker, chunk))
                if len(pending) > 2 * self.workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()

    def _candidates(self) -> dict[int, list[int]]:
        """For each text the earlier texts of train that it should be compared with."""
        lsh = MinHashLSH(num_perm=self.num_perm, params=(self.bands, self.band_size))
        margin = 4 * np.sqrt(self.threshold * (1 - self.threshold) / self.num_perm)
        needed = np.floor((self.threshold - margin) * self.num_perm)
        candidates: dict[int, list[int]] = {}
        for text in self._with_company():
            values = self.signatures[self.firsts[text]]
            signature = MinHash(
                seed=self.seed,
                hashvalues=values,
                permutations=self.signer.permutations,
                scheme=_SCHEME,
            )
            found = np.sort(np.array(lsh.query(signature), np.int64))
            if self.train.counts[text]:
                if len(found) < MAX_CANDIDATES:
                    lsh.insert(text, signature, check_duplication=False)
                else:
                    self.crowded += int(self.train.counts[text])
            # An estimate far below the threshold needs no look at the texts.
            equal = (self.signatures[self.firsts[found]] == values).sum(axis=1)
            if (equal >= needed).any():
                candidates[text] = found[equal >= needed].tolist()
        return candidates

    def _with_company(self) -> list[int]:
        """Texts that share a band with another: no other can be found, so no other is indexed."""
        shared = np.zeros(len(self.firsts), bool)
        for band in range(self.bands):
            keys = np.zeros(len(self.firsts), np.uint64)
            for column in range(band * self.band_size, (band + 1) * self.band_size):
                values = self.signatures[self.firsts, column].astype(np.uint64)
                keys = _mix(keys * np.uint64(0x9E3779B97F4A7C15) + values)
            ordered = np.sort(keys)
            shared |= np.isin(keys, np.unique(ordered[1:][ordered[1:] == ordered[:-1]]))
        # Texts without shingles have nothing to be similar in.
        shared[(self.signatures == 0xFFFFFFFF).all(axis=1)[self.firsts]] = False
        return np.flatnonzero(shared).tolist()

    def _read_again(self, candidates: dict[int, list[int]]) -> dict[int, np.ndarray]:
        """The shingle sets of the candidates, and the first characters of all rows like them."""
        near = set(candidates).union(*candidates.values())
        exact = (self.train.counts > 0) & (self.train.counts + self.eval.counts > 1)
        shown = set(np.flatnonzero(exact).tolist()) | near
        sets: dict[int, np.ndarray] = {}
        if not shown:
            return sets
        for side in (self.train, self.eval):
            for first, chunk in side.again():
                wanted: dict[int, str] = {}
                numbers = side.text_of[first : first + len(chunk)].tolist()
                for i, (number, (_, text, _)) in enumerate(zip(numbers, chunk, strict=True)):
                    if number in shown:
                        side.heads[first + i] = text[:SHOWN_CHARS]
                    if number in near and number not in sets:
                        wanted[number] = text
                if wanted:
                    found = shingle(list(wanted.values()), self.frequent).sets()
                    sets.update(zip(wanted, found, strict=True))
        return sets

    def _compare(
        self, candidates: dict[int, list[int]], sets: dict[int, np.ndarray]
    ) -> tuple[list[tuple[int, int, float]], _Clusters]:
        """Near pairs as (train text, eval text, Jaccard), and the clusters of train's texts."""
        near: list[tuple[int, int, float]] = []
        clusters = _Clusters(len(self.firsts))
        in_train, in_eval = self.train.counts > 0, self.eval.counts > 0
        for text, others in candidates.items():
            for other in others:  # in train, all of them
                inside = bool(in_train[text])
                crosses = bool(in_eval[text] or (inside and in_eval[other]))
                if not crosses and clusters.find(text) == clusters.find(other):
                    continue
                similarity = jaccard(sets[text], sets[other])
                if similarity < self.threshold:
                    continue
                if inside:
                    clusters.join(text, other)
                if in_eval[text]:
                    near.append((other, text, similarity))
                if inside and in_eval[other]:
                    near.append((text, other, similarity))
        return sorted(near), clusters

    def _report(
        self,
        near: list[tuple[int, int, float]],
        clusters: _Clusters,
        shared_groups: list[str],
        started: float,
    ) -> LeakReport:
        train, evaluation = self.train.counts, self.eval.counts
        exact = [(int(t), int(t), 1.0) for t in np.flatnonzero((train > 0) & (evaluation > 0))]
        leaked_train = np.unique([pair[0] for pair in exact + near]).astype(np.int64)
        leaked_eval = np.unique([pair[1] for pair in exact + near]).astype(np.int64)
        repeated = train[train > 1]
        members = clusters.families()
        return LeakReport(
            threshold=self.threshold,
            num_perm=self.num_perm,
            recall_at_threshold=lsh_recall(self.threshold, self.bands, self.band_size),
            train_rows=len(self.train.ids),
            eval_rows=len(self.eval.ids),
            exact_pairs=sum(int(train[t] * evaluation[e]) for t, e, _ in exact),
            near_pairs=sum(int(train[t] * evaluation[e]) for t, e, _ in near),
            leaked_train_rows=int(train[leaked_train].sum()) if len(leaked_train) else 0,
            leaked_eval_rows=int(evaluation[leaked_eval].sum()) if len(leaked_eval) else 0,
            num_shared_groups=len(shared_groups),
            exact_duplicate_rows=int(repeated.sum()),
            exact_extra_rows=int((repeated - 1).sum()),
            near_duplicate_rows=sum(int(train[texts].sum()) for texts in members.values()),
            num_near_clusters=len(members),
            frequent_shingles=len(self.frequent),
            crowded_rows=self.crowded,
            seconds=time.perf_counter() - started,
            pairs=list(islice(self._pairs(exact, near), SHOWN_PAIRS)),
            shared_groups=shared_groups[:SHOWN_PAIRS],
            clusters=self._largest(members),
        )

    def _pairs(
        self, exact: list[tuple[int, int, float]], near: list[tuple[int, int, float]]
    ) -> Iterator[LeakPair]:
        """Every pair of rows, exact ones first, then in the order of train's rows."""
        for pairs in (exact, near):
            for train_text, eval_text, similarity in pairs:
                for t in self.train.rows_with(train_text).tolist():
                    for e in self.eval.rows_with(eval_text).tolist():
                        heads = self.train.heads[t], self.eval.heads[e]
                        ids = self.train.ids[t], self.eval.ids[e]
                        yield LeakPair(*ids, similarity, pairs is exact, *heads)

    def _largest(self, members: dict[int, list[int]]) -> list[Cluster]:
        """Clusters of train with the most rows; exact ones inside near ones are part of them."""
        inside = {text for texts in members.values() for text in texts}
        repeated = np.flatnonzero(self.train.counts > 1).tolist()
        found = [*members.values(), *([text] for text in repeated if text not in inside)]
        found.sort(key=lambda texts: (-int(self.train.counts[texts].sum()), texts[0]))
        clusters = []
        for texts in found[:SHOWN_CLUSTERS]:
            num_rows = int(self.train.counts[texts].sum())
            rows = sorted(chain.from_iterable(self.train.rows_with(t).tolist() for t in texts))
            ids = [self.train.ids[row] for row in rows[:SHOWN_IDS]]
            clusters.append(Cluster(num_rows, len(texts) == 1, ids, self.train.heads[rows[0]]))
        return clusters


def jaccard(one: np.ndarray, other: np.ndarray) -> float:
    """Of two sorted arrays without repetitions."""
    both = np.sort(np.concatenate([one, other]))
    common = int((both[1:] == both[:-1]).sum())
    return common / (len(both) - common) if len(both) else 0.0
