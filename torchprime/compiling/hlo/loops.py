"""Trips of a counted loop.

The condition compares a counter with a limit; the body adds a step to the counter. Both are
found through copies, bitcasts and fusions, with the counter's first value at the loop's operand.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from torchprime.compiling.hlo.parsing import Computation, Instruction

# Instructions whose value is that of their operand.
_SAME = {"copy", "bitcast", "convert", "reshape", "copy-start", "copy-done"}
# The comparison with both sides exchanged.
_EXCHANGED = {"LT": "GT", "GT": "LT", "LE": "GE", "GE": "LE", "NE": "NE"}


class Scope(NamedTuple):
    """A computation, and where it is a fusion's: the scope and the operands of the fusion."""

    computation: Computation
    outer: Scope | None = None
    operands: tuple[str, ...] = ()


class State(NamedTuple):
    """A value that a loop carries from one pass to the next, by its place in the tuple."""

    place: int


class Test(NamedTuple):
    """A comparison of a carried value with a limit."""

    counter: State
    direction: str
    limit: int


def trips(computations: Mapping[str, Computation], around: Computation, loop: Instruction) -> int:
    """Return the number of passes of a loop, 1 if it counts nothing.

    Args:
        around: the computation that contains the loop.
    """
    condition = computations[loop.attribute("condition") or ""]
    body = computations[loop.attribute("body") or ""]
    best = 1
    for test in _tests(computations, Scope(condition), around, loop):
        step = _step(computations, body, test.counter.place)
        first = _first(around, loop, test.counter.place)
        best = max(best, _passes(test, first, step))
    return best


def _passes(test: Test, first: int, step: int) -> int:
    if test.direction in (("LT", "LE") if step < 0 else ("GT", "GE")):
        return 0
    distance = abs(test.limit - first) + (test.direction in ("LE", "GE"))
    return -(-distance // abs(step))


def _tests(
    computations: Mapping[str, Computation],
    scope: Scope,
    around: Computation,
    loop: Instruction,
) -> Iterator[Test]:
    """Yield the comparisons of a condition with a known limit, those in its fusions too."""
    for each in scope.computation.values():
        if each.kind == "fusion":
            for name in each.called:
                inside = Scope(computations.get(name, {}), scope, each.operands)
                yield from _tests(computations, inside, around, loop)
        direction = each.attribute("direction") if each.kind == "compare" else None
        if direction not in _EXCHANGED:
            continue
        left, right = (_value(scope, name) for name in each.operands)
        if isinstance(left, int):
            left, right, direction = right, left, _EXCHANGED[direction]
        if isinstance(right, State):  # the limit is carried too
            right = _value(Scope(around), _carried(around, loop, right.place))
        if isinstance(left, State) and isinstance(right, int):
            yield Test(left, direction, right)


def _value(scope: Scope, name: str) -> int | State | None:
    """Return a constant, or the place of a value that the loop carries; None for another value."""
    found = scope.computation.get(name)
    if found is None:
        return None
    if found.kind == "constant":
        return int(found.operands[0]) if re.fullmatch(r"-?\d+", found.operands[0]) else None
    if found.kind == "parameter" and scope.outer is not None:
        return _value(scope.outer, scope.operands[int(found.operands[0])])
    if found.kind == "get-tuple-element":
        origin = scope.computation.get(found.operands[0])
        place = int(found.attribute("index") or 0)
        if origin is not None and origin.kind == "tuple":
            return _value(scope, origin.operands[place])
        return State(place) if origin is not None and origin.kind == "parameter" else None
    return _value(scope, found.operands[0]) if found.kind in _SAME and found.operands else None


def _carried(around: Computation, loop: Instruction, place: int) -> str:
    """Return the name of the first value of a place in a loop's tuple."""
    start = around.get(loop.operands[0]) if loop.operands else None
    known = start is not None and start.kind == "tuple" and place < len(start.operands)
    return start.operands[place] if start is not None and known else ""


def _first(around: Computation, loop: Instruction, place: int) -> int:
    found = _value(Scope(around), _carried(around, loop, place))
    return found if isinstance(found, int) else 0


def _step(computations: Mapping[str, Computation], body: Computation, place: int) -> int:
    """Return the increment of a loop's counter in one pass, 1 if it is not found."""
    root = next((each for each in body.values() if each.root), None)
    if root is None or root.kind != "tuple" or place >= len(root.operands):
        return 1
    return _sum(computations, Scope(body), root.operands[place], State(place)) or 1


def _sum(
    computations: Mapping[str, Computation], scope: Scope, name: str, counter: State
) -> int | None:
    """Return what a value adds to the counter, None if it is another value."""
    each = scope.computation.get(name)
    if each is None:
        return None
    if each.kind in _SAME and each.operands:
        return _sum(computations, scope, each.operands[0], counter)
    if each.kind == "fusion" and each.called:
        inside = computations.get(each.called[0], {})
        root = next((i.name for i in inside.values() if i.root), "")
        return _sum(computations, Scope(inside, scope, each.operands), root, counter)
    if each.kind not in ("add", "subtract"):
        return None
    left, right = (_value(scope, operand) for operand in each.operands)
    if each.kind == "add" and isinstance(left, int):
        left, right = right, left
    if left != counter or not isinstance(right, int):
        return None
    return right if each.kind == "add" else -right
