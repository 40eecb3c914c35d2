"""The difference between an export's tensors and those of its base model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NotRequired, TypedDict

import torch

from torchprime.checkpoint.hf.read import SafetensorsReader
from torchprime.checkpoint.hf.weight_names import EMBEDDING, HEAD
from torchprime.errors import CheckpointError

PIECE = 1 << 24  # values that are compared at a time


class BaseChanges(TypedDict):
    """Differences of an export from its base, as a certificate has them.

    `tensors` and `changed` are counts of tensors. `largest_change` is the largest absolute
    difference of two values, as text if it is infinite, and `largest_change_in` its tensor.
    `new_rows` is the number of rows of embedding and head that were not compared; `unused_rows`
    are those that the base has but did not use. Both are absent if there are none.
    """

    tensors: int
    changed: int
    largest_change: float | str
    largest_change_in: str | None
    new_rows: NotRequired[int]
    unused_rows: NotRequired[list[int]]


def told_changes(values: Mapping[str, Any]) -> str:
    """Return the numbers of `changes_from` in words."""
    new, largest = values.get("new_rows"), float(values["largest_change"])
    return (
        f"{values['changed']} of {values['tensors']} tensors differ from the base, the largest "
        f"change is {largest:.3g} in {values['largest_change_in']}"
    ) + (f"; {new:,} rows are new and not compared" if new else "")


def changes_from(
    base: SafetensorsReader, export: SafetensorsReader, unused_rows: Sequence[int] = ()
) -> BaseChanges:
    """Compare the exported tensors with the base's, cast to the export's dtype.

    Embedding and output head may have rows that the base did not train: more rows than the base's,
    or rows that it did not use. They are counted (`new_rows`, present only if there are any), and
    the other rows are compared.

    Args:
        unused_rows: rows of the base's embedding and head that were initialized for new tokens.

    Raises:
        CheckpointError: the base lacks a tensor, or has it in another shape.
    """
    listing = export.names()
    if HEAD not in listing:  # a tied model
        base.share_head()
    theirs = base.names()
    changed, new_rows, largest, where = 0, 0, 0.0, None
    for name, (shape, dtype) in listing.items():
        more = _more_rows(name, shape, theirs)
        unused = unused_rows if name in (EMBEDDING, HEAD) else ()
        new_rows += more + len(unused)
        new = export.get(name)[: shape[0] - more]
        difference = _largest_difference(new, base.get(name), dtype, unused)
        changed += difference > 0
        if difference > largest:
            largest, where = difference, name
    values: BaseChanges = {
        "tensors": len(listing),
        "changed": changed,
        "largest_change": largest if math.isfinite(largest) else str(largest),
        "largest_change_in": where,
    }
    if new_rows:
        values["new_rows"] = new_rows
    if len(unused_rows):
        values["unused_rows"] = list(unused_rows)
    return values


def _largest_difference(
    new: torch.Tensor, old: torch.Tensor, dtype: torch.dtype, left_out: Sequence[int]
) -> float:
    """Return the largest difference of two tensors of one shape, without some rows; infinite if
    there is a NaN."""
    width = old.numel() // old.shape[0]
    difference, start = 0.0, 0
    pieces = zip(new.reshape(-1).split(PIECE), old.reshape(-1).split(PIECE), strict=True)
    for mine, its in pieces:
        away = (mine.float() - its.to(dtype).float()).abs()
        for first in (row * width - start for row in left_out):
            away[max(first, 0) : max(first + width, 0)] = 0
        farthest = away.max().item()
        difference = max(difference, farthest) if farthest == farthest else math.inf
        start += len(away)
    return difference


def _more_rows(
    name: str, shape: tuple[int, ...], theirs: Mapping[str, tuple[tuple[int, ...], Any]]
) -> int:
    """Return the number of rows that an exported tensor has beyond the base's.

    Raises:
        CheckpointError: the base lacks the tensor, or has it in a shape that no new rows explain.
    """
    if name in theirs:
        old = theirs[name][0]
        grown = name in (EMBEDDING, HEAD) and shape[1:] == old[1:] and shape[0] > old[0]
        if shape == old or grown:
            return shape[0] - old[0] if grown else 0
    other = f"has it as {list(theirs[name][0])}" if name in theirs else "does not have it"
    raise CheckpointError(f"{name} is {list(shape)} in the export; the base {other}")
