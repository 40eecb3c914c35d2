"""Measure the time and the recall of the leak check.

Rows as long as GSM8K's (about 80 words, a part of their sentences from a common stock, so that
unlike rows share phrases) with known copies planted: exact ones with other case, spacing and
punctuation, and near ones with a few words replaced, from eval into train and inside train. Every
reported pair is compared again word by word, by code that shares nothing with the check but the
normalization. The seconds include the report on duplicates inside train.

    python benchmarks/leak_check.py [--train N] [--eval N] [--workers N] [--seed N] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import string
import time
from itertools import accumulate
from pathlib import Path
from typing import Any

from torchprime.data.leaks.find import find_leaks
from torchprime.data.leaks.report import LeakReport
from torchprime.data.leaks.shingles import normalize

WORDS, STOCK, FROM_STOCK = 20_000, 2_000, 0.2
EXACT, NEAR = 300, 600  # planted across; the same again inside train. Their sum is listed in full
BANDS = ((0.8, 0.85), (0.85, 0.9), (0.9, 1.01))

Rows = list[tuple[str, str, "str | None"]]


class Writer:
    """Makes rows and altered copies of rows."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        letters = string.ascii_lowercase
        self.words = [
            "".join(self.random.choices(letters, k=self.random.randint(2, 9))) for _ in range(WORDS)
        ]
        # As often as in language.
        self.weights = list(accumulate(1 / (rank + 10) for rank in range(WORDS)))
        self.stock = [self.sentence() for _ in range(STOCK)]

    def sentence(self) -> str:
        words = self.random.choices(
            self.words, cum_weights=self.weights, k=self.random.randint(9, 17)
        )
        words[self.random.randrange(len(words))] = str(self.random.randint(2, 999))
        return " ".join(words).capitalize() + "."

    def row(self) -> str:
        return " ".join(
            self.random.choice(self.stock) if self.random.random() < FROM_STOCK else self.sentence()
            for _ in range(self.random.randint(5, 7))
        )

    def dressed_otherwise(self, text: str) -> str:
        """Return the same words."""
        return "  " + text.upper().replace(". ", " !\n").replace(" ", "  ", 5)

    def altered(self, text: str) -> str:
        """One to three words replaced."""
        words = text.split()
        for _ in range(self.random.randint(1, 3)):
            words[self.random.randrange(len(words))] = self.random.choice(self.words)
        return " ".join(words)


def jaccard(one: str, other: str) -> float:
    """Return the Jaccard similarity of the sets of five words on end."""
    sets = []
    for text in (one, other):
        words = normalize(text).split()
        sets.append({tuple(words[i : i + 5]) for i in range(len(words) - 4)})
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def make_rows(num_train: int, num_eval: int, seed: int) -> tuple[Rows, Rows, dict[str, Any]]:
    """Rows of both sides, and what was planted: pairs of ids with their similarity."""
    writer = Writer(seed)
    evaluation = [writer.row() for _ in range(num_eval)]
    train = [writer.row() for _ in range(num_train - 2 * (EXACT + NEAR))]
    sources = writer.random.sample(range(num_eval), EXACT + NEAR)
    inside = writer.random.sample(range(len(train)), EXACT + NEAR)
    copies: list[tuple[str, str, int, str]] = []  # kind, text, the original's place, its text
    for kind, places, texts in (("across", sources, evaluation), ("inside", inside, train)):
        for i, place in enumerate(places):
            change = writer.dressed_otherwise if i < EXACT else writer.altered
            copies.append((kind, change(texts[place]), place, texts[place]))
    planted: dict[str, Any] = {"across": {}, "inside": []}
    train += [text for _, text, _, _ in copies]
    for at, (kind, text, place, original) in enumerate(copies, num_train - len(copies)):
        exact = normalize(text) == normalize(original)
        similarity = 1.0 if exact else jaccard(text, original)
        if kind == "across":
            planted["across"][f"train:{at}", f"eval:{place}"] = similarity
        else:
            planted["inside"].append(similarity)
    named: list[Rows] = [
        [(f"{name}:{i}", text, None) for i, text in enumerate(texts)]
        for name, texts in (("train", train), ("eval", evaluation))
    ]
    return named[0], named[1], planted


def judge(report: LeakReport, train: Rows, evaluation: Rows, planted: dict[str, Any]) -> Any:
    """Recall by similarity, and the reported pairs that are none."""
    texts = {row_id: text for row_id, text, _ in train + evaluation}
    found = {(pair.train_id, pair.eval_id): pair for pair in report.pairs}
    false = [
        ids
        for ids, pair in found.items()
        if (normalize(texts[ids[0]]) != normalize(texts[ids[1]]) if pair.exact else
            jaccard(texts[ids[0]], texts[ids[1]]) < report.threshold)
    ]  # fmt: skip
    exact = [ids for ids, similarity in planted["across"].items() if similarity == 1.0]
    rows = [("exact", len(exact), sum(ids in found and found[ids].exact for ids in exact))]
    for low, high in BANDS:
        near = [ids for ids, s in planted["across"].items() if low <= s < high and s != 1.0]
        name = f"near, {low:.2f} to {min(high, 1):.2f}"
        rows.append((name, len(near), sum(ids in found for ids in near)))
    return {
        "recall": rows,
        "reported_pairs": len(found),
        "false_pairs": len(false),
        "not_planted": len(set(found) - set(planted["across"])),
        "inside_exact_expected": 2 * EXACT,
        "inside_exact_found": report.exact_duplicate_rows,
        "inside_near_expected": 2 * sum(0.8 <= s < 1 for s in planted["inside"]),
        "inside_near_found": report.near_duplicate_rows,
    }


def main() -> None:
    """Make the rows, check them, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--train", type=int, default=100_000)
    parser.add_argument("--eval", type=int, default=10_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    train, evaluation, planted = make_rows(args.train, args.eval, args.seed)
    words = sum(len(text.split()) for _, text, _ in train) / len(train)
    before, load = _peak_mib(), os.getloadavg()[0]
    started = time.perf_counter()
    report = find_leaks(train, evaluation, workers=args.workers, seed=args.seed)
    seconds = time.perf_counter() - started
    result = judge(report, train, evaluation, planted)
    print(report.summary(), end="\n\n")
    print("| planted across | pairs | found | recall |\n|---|---|---|---|")
    for name, total, found in result["recall"]:
        print(f"| {name} | {total:,} | {found:,} | {found / max(1, total):.3f} |")
    print(
        f"\n- {args.train:,} train rows ({words:.0f} words) against {args.eval:,}: {seconds:.1f} s,"
        f" {args.workers} workers, {os.cpu_count()} cores, load before {load:.1f}\n"
        f"- {result['reported_pairs']:,} pairs reported, {result['false_pairs']} of them false, "
        f"{result['not_planted']} true but not planted\n"
        f"- inside train: {result['inside_exact_found']:,} of {result['inside_exact_expected']:,} "
        f"rows in exact clusters, {result['inside_near_found']:,} of "
        f"{result['inside_near_expected']:,} in near ones\n"
        f"- peak memory of this process {_peak_mib():,.0f} MiB ({before:,.0f} before the check)"
    )
    if args.json:
        args.json.write_text(json.dumps(result | {"seconds": seconds}, indent=2) + "\n")


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
