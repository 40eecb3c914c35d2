"""Do runs that saw the same batches have the same losses? A verdict, a table and a figure.

python experimental/mesh_agreement/compare_runs.py RUN RUN [RUN...] [--tolerance 1e-4] [--figure F]

Exit code 0 when every loss of every run is within the tolerance of the first run's, relative; 1
when not, or when the runs did not see the same batches.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from torchprime.metrics.writers import read_metrics


def curves(run: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The run's train and eval records in step order."""
    records = read_metrics(run / "metrics.jsonl")
    kinds = ([r for r in records if r["kind"] == kind] for kind in ("train", "eval"))
    train, held_out = kinds
    return train, held_out


def differences(first: list[dict[str, Any]], other: list[dict[str, Any]], key: str) -> list[float]:
    """Relative difference of a number, step by step."""
    return [abs(b[key] - a[key]) / abs(a[key]) for a, b in zip(first, other, strict=True)]


def main() -> int:
    """Compare, print and draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--tolerance", type=float, default=1e-4)
    parser.add_argument("--figure", type=Path)
    args = parser.parse_args()
    found = {run.name: curves(run) for run in args.runs}
    reference, *others = found
    first_train, first_eval = found[reference]
    agreed = True
    print(f"| run | steps | held-out loss before -> after | largest difference from {reference} |")
    print("|---|---|---|---|")
    for name, (train, held_out) in found.items():
        hashes = [r["batch_hash"] for r in train]
        if hashes != [r["batch_hash"] for r in first_train]:
            print(f"{name}: not the batches of {reference}; nothing to compare", file=sys.stderr)
            return 1
        worst = max(
            differences(first_train, train, "loss") + differences(first_eval, held_out, "eval_loss")
        )
        agreed &= worst <= args.tolerance
        before, after = held_out[0]["eval_loss"], held_out[-1]["eval_loss"]
        print(f"| {name} | {len(train)} | {before:.4f} -> {after:.4f} | {worst:.1e} |")
    print("agree" if agreed else "DO NOT agree", f"to {args.tolerance:.0e} relative")
    if args.figure:
        draw(found, reference, others, args.tolerance, args.figure)
    return 0 if agreed else 1


def draw(found: dict, reference: str, others: list[str], tolerance: float, path: Path) -> None:
    """Losses above, relative differences with the tolerance below."""
    figure, (top, bottom) = plt.subplots(2, 1, sharex=True, figsize=(8, 6), height_ratios=(2, 1))
    styles = ["-", "--", ":", "-."]
    for style, (name, (train, held_out)) in zip(styles, found.items(), strict=False):
        steps = [r["step"] for r in train]
        (line,) = top.plot(steps, [r["loss"] for r in train], style, lw=1, label=f"{name}, train")
        top.plot(
            [r["step"] for r in held_out],
            [r["eval_loss"] for r in held_out],
            "o",
            ms=5,
            color=line.get_color(),
            label=f"{name}, held out",
        )
        if name in others:
            worst = differences(found[reference][0], train, "loss")
            bottom.semilogy(steps, [max(w, 1e-9) for w in worst], lw=1, color=line.get_color())
    bottom.axhline(tolerance, color="gray", ls="--", lw=1)
    bottom.annotate(f"tolerance {tolerance:.0e}", (0, tolerance), va="bottom", color="gray")
    top.set_ylabel("loss, nats per supervised token")
    bottom.set_ylabel(f"difference from\n{reference}, relative")
    bottom.set_xlabel("step")
    top.legend(frameon=False, ncols=len(found), fontsize=8)
    for axes in (top, bottom):
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    sys.exit(main())
