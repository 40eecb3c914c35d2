"""Parser of HLO text: computations, and the instructions in each of them.

An instruction is one line, except where the compiler prints the metadata of a Pallas kernel on
lines of its own. Those lines can start with a brace, as the end of a computation does. So the
parser joins lines until all braces outside quoted text are closed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

WIDTHS = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2}
WIDTHS |= {"s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8, "f8e4m3fn": 1, "f8e5m2": 1}
_ARRAY = re.compile(r"\b(" + "|".join(WIDTHS) + r")\[([\d,]*)\](\{[^}]*\})?")
_OPENING = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_NAME = re.compile(r"^\s*(ROOT )?%([\w.\-]+) = ")
_QUOTED = re.compile(r'"(?:[^"\\]|\\.)*"')
_CALLED = re.compile(r"\b(?:calls|to_apply|called_computations)=\{?%?([\w.\-]+)")


@dataclass(frozen=True)
class Array:
    """One array of a result."""

    dtype: str
    shape: tuple[int, ...]
    in_hbm: bool  # else in a memory on the core or on the host

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.elements * WIDTHS[self.dtype]


@dataclass(frozen=True)
class Instruction:
    """One instruction of a computation."""

    name: str
    kind: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]  # names; of a parameter its place, of a constant its value
    rest: str  # everything after the operands
    root: bool

    def attribute(self, name: str) -> str | None:
        """Return the value of `name=value` or `name={value}`, as text."""
        found = re.search(rf"\b{name}=(?:\{{([^}}]*)\}}|%?([\w.\-]+))", self.rest)
        return None if found is None else found.group(1) if found.group(1) else found.group(2)

    @property
    def called(self) -> list[str]:
        """The names of the computations that this instruction calls or applies."""
        return _CALLED.findall(self.rest)

    @property
    def purpose(self) -> str:
        """The name that the traced program gave to the operation, "" without one."""
        return (re.findall(r'op_name="([^"]*)"', self.rest) or [""])[0]

    @property
    def elements(self) -> int:
        return sum(array.elements for array in self.arrays)

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.arrays)

    @property
    def hbm_bytes(self) -> int:
        return sum(array.nbytes for array in self.arrays if array.in_hbm)


Computation = dict[str, Instruction]


class Parsed(NamedTuple):
    """The computations of a program by name, and the name of the one that runs first."""

    computations: dict[str, Computation]
    entry: str


def parse(text: str) -> Parsed:
    """Return the content of a program as XLA prints it."""
    computations: dict[str, Computation] = {}
    entry = ""
    current: Computation | None = None
    for line in _logical_lines(text):
        opening = _OPENING.match(line)
        if opening:
            current = computations[opening.group(2)] = {}
            entry = opening.group(2) if opening.group(1) else entry
        elif line.startswith("}"):
            current = None
        elif current is not None:
            instruction = _instruction(line)
            if instruction is not None:
                current[instruction.name] = instruction
    return Parsed(computations, entry)


def _logical_lines(text: str) -> Iterator[str]:
    """Yield each instruction as one line, the other lines as they are."""
    pending, depth = "", 0
    for line in text.splitlines():
        begins = _NAME.match(line) is not None
        if pending and not begins and not _OPENING.match(line):
            pending, depth = pending + line, depth + _open_braces(line)
        elif pending:  # never closed: the next one begins all the same
            yield pending
            pending, depth = "", 0
        if not pending:
            if begins and (depth := _open_braces(line)) > 0:
                pending = line
            else:
                yield line
        elif depth <= 0:
            yield pending
            pending, depth = "", 0
    if pending:
        yield pending


def _open_braces(line: str) -> int:
    """Return the number of braces that a line opens and does not close, outside quoted text."""
    bare = _QUOTED.sub("", line)
    return bare.count("{") - bare.count("}")


def _closing(text: str, start: int) -> int:
    """Return the index at which the parenthesis that opens at `start` closes."""
    depth = 0
    for place in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[place], 0)
        if depth == 0:
            return place
    return len(text)


def _arrays(text: str) -> tuple[Array, ...]:
    return tuple(
        Array(
            dtype, tuple(int(n) for n in dims.split(",") if n), not re.search(r"S\([1-9]", layout)
        )
        for dtype, dims, layout in _ARRAY.findall(text)
    )


def _instruction(line: str) -> Instruction | None:
    found = _NAME.match(line)
    if found is None:
        return None
    start = found.end()
    end = _closing(line, start) + 1 if line[start] == "(" else line.find(" ", start)
    opening = line.find("(", end)
    closing = _closing(line, opening)
    operands = tuple(re.findall(r"%([\w.\-]+)", line[opening:closing]))
    kind = line[end:opening].strip()
    if kind in ("constant", "parameter"):
        operands = (line[opening + 1 : closing],)
    return Instruction(
        found.group(2),
        kind,
        _arrays(line[start:end]),
        operands,
        line[closing + 1 :],
        bool(found[1]),
    )
