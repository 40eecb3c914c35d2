"""Collectives of a program: payload, and bytes over a chip's links.

The payload is the whole array that is gathered, reduced or exchanged. In a ring of n chips a part
of (n - 1) / n of it leaves each chip, for an all-reduce twice that (it scatters sums, then gathers
them). Published link speeds are one way, out of a chip.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from torchprime.compiling.hlo.parsing import Instruction

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "ragged-all-to-all",
)


@dataclass(frozen=True)
class Collective:
    """A collective, once for its place in the program."""

    kind: str
    channel: str
    chips: int  # that take part; 0 if the program does not say
    runs: int  # in one step
    payload: int  # bytes: of the whole that is gathered, reduced or exchanged, on one chip
    dtype: str
    where: str  # its purpose, as named by the traced program

    @property
    def crossing(self) -> int:
        """The bytes of one run that leave a chip over its links."""
        if self.kind == "collective-permute":
            return self.payload
        passes = 2 if self.kind == "all-reduce" else 1
        kept = -(-self.payload // self.chips) if self.chips else 0
        return passes * (self.payload - kept)


def as_collective(computation: str, each: Instruction, runs: int) -> Collective | None:
    """Return a collective; None for another instruction, and for the end of an asynchronous one.

    Args:
        computation: the name of the one that contains the instruction.
        runs: of the collective in one step.
    """
    kind = each.kind.removesuffix("-start")
    if kind not in COLLECTIVES or not each.arrays:
        return None
    if kind == "all-reduce" and "reduce-scatter" in computation:
        kind = "reduce-scatter"
    chips = _group_size(each)
    sizes = [array.nbytes for array in each.arrays]
    # The result of most starts is (operand, result, ...): the larger is the whole.
    pair = each.kind.endswith("-start") and kind != "all-reduce"
    payload = max(sizes) if pair else sum(sizes)
    if each.kind == "reduce-scatter":  # its result is a part; its operand is the whole
        payload *= chips or 1
    channel = each.attribute("channel_id") or each.name
    dtype = each.arrays[0].dtype
    return Collective(kind, channel, chips, runs, payload, dtype, each.purpose)


def _group_size(each: Instruction) -> int:
    """Return the number of chips that take part, from either notation of groups; 0 if neither is
    there."""
    lists = re.search(r"replica_groups=\{\{([\d,]*)\}", each.rest)
    if lists:
        return lists.group(1).count(",") + 1
    compact = re.search(r"replica_groups=\[\d+,(\d+)\]", each.rest)
    return int(compact.group(1)) if compact else 0
