"""A search for rows in both train and eval, exact or near, and for duplicates inside train.

    texts -> shingles (shingles.py) -> MinHash signatures (minhash.py) -> bands that rows share
          -> candidates -> exact Jaccard of the candidates' shingle sets -> pairs and clusters

Two rows are exact duplicates when their normalized texts are equal, and near-duplicates when the
Jaccard similarity of their sets of shingles reaches the threshold. MinHash and LSH (datasketch)
only propose pairs: every reported pair was compared shingle by shingle. So the report has no false
pair, and misses a pair at the threshold with the probability 1 - `lsh_recall`: at the default
threshold of 0.8, 5% at exactly 0.8, 0.6% at 0.85 and 0.01% at 0.9.

Shingles that more than 2% of the rows contain (a system prompt, the frame of a template) are left
out of the sets. Otherwise rows would seem alike because of text that all of them share.

The rows are read up to three times and never held in memory: a sample for the frequent shingles,
all for the signatures (512 bytes a row), and the texts of candidates for the comparison. Groups
that are on both sides are found in the same passes.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from itertools import chain, islice

import numpy as np
from datasketch import MinHashLSH

from torchprime.config.sections.dataset import DatasetConfig
from torchprime.data.leaks.minhash import (
    NUM_PERM,
    Signer,
    bands_for,
    lsh_recall,
    sign_in_worker,
    start_worker,
)
from torchprime.data.leaks.report import Cluster, LeakPair, LeakReport
from torchprime.data.leaks.shingles import (
    CHUNK_ROWS,
    TextRow,
    frequent_shingles,
    in_chunks,
    jaccard,
    mix,
    shingle,
)
from torchprime.data.shared.worker_pool import worker_pool
from torchprime.errors import ConfigError, DataError

SHOWN_PAIRS, SHOWN_CLUSTERS, SHOWN_IDS, SHOWN_CHARS = 1000, 20, 10, 80
PARALLEL_FROM = 20_000
# A row is compared with at most this many others: pairs grow with the square of a cluster's size.
MAX_CANDIDATES = 300


def find_leaks(
    train: Iterable[TextRow],
    evaluation: Iterable[TextRow],
    *,
    threshold: float = DatasetConfig.leak_threshold,
    num_perm: int = NUM_PERM,
    workers: int = 2,
    seed: int = 0,
) -> LeakReport:
    """Compare eval with train and train with itself. `workers` does not change the result.

    Args:
        train: (row id, text, group or None) of each training row, iterable three times with the
            same result: a list or an object with __iter__, not a generator.
        evaluation: the same of each held-out row.
        threshold: Jaccard similarity from which rows are near-duplicates, in (0, 1].
        num_perm: length of a signature; twice the length needs twice the memory.
        workers: processes for the signatures, used from PARALLEL_FROM rows on.
        seed: of the permutations; changes which pairs are missed.

    Raises:
        ConfigError: a threshold outside of (0, 1], or too few permutations.
        DataError: a second reading gave other rows.
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


class _Clusters:
    """Clusters of texts, from the pairs joined so far (union-find)."""

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
        """Return the clusters of two or more texts, each under its first member."""
        found: dict[int, list[int]] = {}
        for item, parent in enumerate(self.parents):
            if parent != item:
                first = self.find(item)
                found.setdefault(first, [first]).append(item)
        return found


class _Side:
    """One side's rows: ids, and for each row the number of its distinct text."""

    def __init__(self, name: str, rows: Iterable[TextRow]) -> None:
        self.name, self.rows = name, rows
        self.ids: list[str] = []
        self.text_of = np.empty(0, np.int64)  # [rows]
        self.counts = np.empty(0, np.int64)  # [texts]: rows with this text
        self.heads: dict[int, str] = {}  # first characters of the rows that may be shown
        self._by_text: np.ndarray | None = None

    def again(self) -> Iterator[tuple[int, list[TextRow]]]:
        """Yield the rows in chunks once more; raise a DataError if they are not the same rows."""
        total = 0
        for first, chunk in in_chunks(self.rows):
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
        """Return the indices of the rows with this text, in order."""
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
        self.signer = Signer(self.num_perm, self.seed, self.frequent)
        shared_groups = self._sign()
        candidates = self._candidates()
        sets = self._read_again(candidates)
        near, clusters = self._compare(candidates, sets)
        return self._report(near, clusters, shared_groups, started)

    def _sign(self) -> list[str]:
        """Fill the sides and the signatures; return the groups that are on both sides."""
        keys, rows = [np.empty(0, np.uint64)], 0
        groups: dict[str, set[str]] = {"train": set(), "eval": set()}
        for side in (self.train, self.eval):
            for chunk_keys, signatures in self._signed(side, groups[side.name]):
                start, rows = rows, rows + len(chunk_keys)
                if rows > len(self.signatures):
                    # In place: a copy would double the memory.
                    size = max(rows, len(self.signatures) * 9 // 8)
                    self.signatures.resize((size, self.num_perm), refcheck=False)
                self.signatures[start:rows] = signatures
                keys.append(chunk_keys)
        self.signatures.resize((rows, self.num_perm), refcheck=False)
        _, firsts, text_of = np.unique(np.concatenate(keys), return_index=True, return_inverse=True)
        # Texts are numbered in the order of their first rows, train's before eval's.
        order = np.argsort(firsts)
        numbers = np.empty_like(order)
        numbers[order] = np.arange(len(order))
        self.firsts, text_of = firsts[order], numbers[text_of]
        self.train.text_of, self.eval.text_of = np.split(text_of, [len(self.train.ids)])
        for side in (self.train, self.eval):
            side.counts = np.bincount(side.text_of, minlength=len(order))
        return sorted(groups["train"] & groups["eval"])

    def _signed(self, side: _Side, groups: set[str]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield keys and signatures, chunk by chunk in order; record ids and groups."""

        def texts() -> Iterator[list[str]]:
            for _, chunk in in_chunks(side.rows):
                side.ids.extend(row_id for row_id, _, _ in chunk)
                groups.update(group for _, _, group in chunk if group is not None)
                yield [text for _, text, _ in chunk]

        chunks = texts()
        # A few rows are signed in less time than it takes to start a process.
        alone = PARALLEL_FROM // CHUNK_ROWS if self.workers > 1 else None
        yield from map(self.signer.sign, islice(chunks, alone))
        first = next(chunks, None)
        if first is None:
            return
        pending: deque[Future[tuple[np.ndarray, np.ndarray]]] = deque()
        given = (self.num_perm, self.seed, self.frequent)
        with worker_pool(self.workers, "comparing rows", start_worker, given) as pool:
            for chunk in chain([first], chunks):
                pending.append(pool.submit(sign_in_worker, chunk))
                if len(pending) > 2 * self.workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()

    def _candidates(self) -> dict[int, list[int]]:
        """Return for each text the earlier texts of train to compare it with."""
        lsh = MinHashLSH(num_perm=self.num_perm, params=(self.bands, self.band_size))
        margin = 4 * np.sqrt(self.threshold * (1 - self.threshold) / self.num_perm)
        needed = np.floor((self.threshold - margin) * self.num_perm)
        candidates: dict[int, list[int]] = {}
        for text in self._with_company():
            values = self.signatures[self.firsts[text]]
            signature = self.signer.minhash(values)
            found = np.sort(np.array(lsh.query(signature), np.int64))
            if self.train.counts[text]:
                if len(found) < MAX_CANDIDATES:
                    lsh.insert(text, signature, check_duplication=False)
                else:
                    self.crowded += int(self.train.counts[text])
            # A pair estimated far below the threshold need not be compared.
            equal = (self.signatures[self.firsts[found]] == values).sum(axis=1)
            if (equal >= needed).any():
                candidates[text] = found[equal >= needed].tolist()
        return candidates

    def _with_company(self) -> list[int]:
        """Return the texts that share a band with another; only these need an index entry."""
        shared = np.zeros(len(self.firsts), bool)
        for band in range(self.bands):
            keys = np.zeros(len(self.firsts), np.uint64)
            for column in range(band * self.band_size, (band + 1) * self.band_size):
                values = self.signatures[self.firsts, column].astype(np.uint64)
                keys = mix(keys * np.uint64(0x9E3779B97F4A7C15) + values)
            ordered = np.sort(keys)
            shared |= np.isin(keys, np.unique(ordered[1:][ordered[1:] == ordered[:-1]]))
        # Texts without shingles can't be similar to others.
        shared[(self.signatures == 0xFFFFFFFF).all(axis=1)[self.firsts]] = False
        return np.flatnonzero(shared).tolist()

    def _read_again(self, candidates: dict[int, list[int]]) -> dict[int, np.ndarray]:
        """Read the candidates' shingle sets, and the first characters of all matching rows."""
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
        """Return near pairs as (train text, eval text, Jaccard), and clusters of train's texts."""
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
        """Return every pair of rows, exact ones first, then in the order of train's rows."""
        for pairs in (exact, near):
            for train_text, eval_text, similarity in pairs:
                for t in self.train.rows_with(train_text).tolist():
                    for e in self.eval.rows_with(eval_text).tolist():
                        heads = self.train.heads[t], self.eval.heads[e]
                        ids = self.train.ids[t], self.eval.ids[e]
                        yield LeakPair(*ids, similarity, pairs is exact, *heads)

    def _largest(self, members: dict[int, list[int]]) -> list[Cluster]:
        """Return train's largest clusters; exact ones inside near ones are part of them."""
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
