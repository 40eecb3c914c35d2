"""Title and subtitle of a comparison's figure."""

from __future__ import annotations

import math

from torchprime.compare.verdict import AGREE, DIFFER, TOO_FEW, Comparison

WORDS = {
    "loss": "loss",
    "eval_loss": "held-out loss",
    "grad_norm": "gradient norm",
    "lr": "learning rate",
}


def title(comparison: Comparison) -> str:
    """Return the verdict in words that need only the figure to be understood."""
    reference = comparison.reference.label
    if comparison.verdict in (AGREE, TOO_FEW):
        others = [pair.run.label for pair in comparison.pairs]
        who = f"{others[0]} agrees" if len(others) == 1 else f"{len(others)} runs agree"
        if comparison.verdict == TOO_FEW:
            return f"Too few steps: {comparison.told_steps} of {reference} and the others compared"
        return f"{who} with {reference} over {comparison.told_steps}"
    out = [pair for pair in comparison.pairs if pair.verdict == DIFFER]
    if not out:
        return f"Not judged: the noise of {reference} and the others is not measured"
    if len(out) > 1:
        return f"{len(out)} of {len(comparison.pairs)} runs differ from {reference}"
    found = out[0].first_beyond
    assert found is not None
    what = WORDS[found[0]]
    return f"{out[0].run.label} differs from {reference}: {what}, first at step {found[1].step:,}"


def subtitle(comparison: Comparison) -> str:
    """Return the largest difference of each quantity, with its band."""
    told = []
    for name, words in WORDS.items():
        found = [pair.quantities[name] for pair in comparison.pairs if name in pair.quantities]
        if not found:
            continue
        point = max((each.worst for each in found), key=lambda point: point.relative)
        if name == "lr" and not point.relative:
            continue
        amount = f"{point.relative:.1e}" if math.isfinite(point.relative) else "not finite"
        band = "no band" if point.band is None else f"band {point.band:.0e}"
        told.append(f"{words} {amount if point.relative else '0'} ({band})")
    unknown = [pair.run.label for pair in comparison.pairs if not pair.data.same]
    of_whom = unknown[0] if len(unknown) == 1 else f"{len(unknown)} runs"
    data = f"no hashes of {of_whom}" if unknown else "same batches by their hashes"
    return f"Largest relative difference: {', '.join(told)}; {data}"
