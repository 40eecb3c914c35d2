"""Bytes that an operation reads and writes in the chip's memory (HBM).

An operation reads each operand and writes its result once, as far as they are in HBM. Of an
operand that it only slices it reads the slice; an operand that it updates in place it does not
read, and it writes the update. A fusion is followed into the fusions inside it: what they slice,
pass through or update in place counts the same way. An asynchronous copy or slice counts once, at
its start.

An asynchronous collective of libtpu 0.0.21 is a fusion that starts it, fusions that carry its
buffers beside their own work, and one that ends it. It reads its operand and writes its result
once, at its start. Two things are not in the numbers: the padding of arrays to whole tiles, and
blocks that a custom kernel reads more than once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torchprime.compiling.hlo.collectives import COLLECTIVES
from torchprime.compiling.hlo.parsing import WIDTHS, Computation, Instruction

SLICES = ("dynamic-slice", "slice", "gather")
UPDATES = {"dynamic-update-slice": 1, "scatter": 2}  # kind: place of the update's operand
_SILENT = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id",
    "replica-id", "optimization-barrier", "while", "conditional", "call",
}  # fmt: skip
# Custom calls that move nothing.
_SILENT_CALLS = ('"AllocateBuffer"', '"ConcatBitcast"')
# Operations whose every result needs only the operands' elements at its own place.
_ELEMENTWISE = {
    "bitcast", "copy", "convert", "reshape", "transpose", "negate", "abs", "exponential", "log",
    "tanh", "logistic", "rsqrt", "sqrt", "not", "add", "subtract", "multiply", "divide", "maximum",
    "minimum", "and", "or", "xor", "compare", "select", "shift-left", "shift-right-logical",
    "shift-right-arithmetic", "power", "clamp",
}  # fmt: skip


class Traffic(NamedTuple):
    """Bytes of one run."""

    read: int
    written: int


def hbm_traffic(
    computations: Mapping[str, Computation], around: Computation, each: Instruction
) -> Traffic:
    """Return the bytes of one run of an operation.

    Args:
        around: the computation that contains it.
    """
    kind = each.kind
    if kind in _SILENT or kind.endswith(("-done", "-update")) or _is_silent_call(each):
        return Traffic(0, 0)
    operands = [around.get(name) for name in each.operands]
    whole = [operand.hbm_bytes if operand is not None else 0 for operand in operands]
    if kind == "fusion":
        return _fusion(computations, around, each)
    if kind.endswith("-start"):
        return _start(computations, each, whole)
    if kind in SLICES:
        first = each.nbytes if whole[0] else 0
        return Traffic(min(first, whole[0]) + sum(whole[1:]), each.hbm_bytes)
    if kind in UPDATES:
        update = operands[UPDATES[kind]]
        written = update.nbytes if update is not None and each.hbm_bytes else 0
        return Traffic(sum(whole[1:]), written)
    return Traffic(sum(whole), each.hbm_bytes)


def _is_silent_call(each: Instruction) -> bool:
    return each.kind == "custom-call" and any(name in each.rest for name in _SILENT_CALLS)


def _start(computations: Mapping[str, Computation], each: Instruction, whole: list[int]) -> Traffic:
    """Return the bytes of an asynchronous operation; its result has the operands in it too.

    The compiler's own text of a program writes one as `async-start`, with the operation in a
    computation.
    """
    kind = each.kind.removesuffix("-start")
    if kind == "async" and each.called:
        inside = computations.get(each.called[0], {})
        kind = next((i.kind for i in inside.values() if i.root), kind)
    if kind == "copy":  # (result, operand, flag)
        return Traffic(whole[0], each.arrays[0].nbytes if each.arrays[0].in_hbm else 0)
    if kind == "all-reduce":  # only the result
        return Traffic(sum(whole), each.hbm_bytes)
    results = each.arrays[len(whole) :]  # (operands, results, flags)
    written = sum(array.nbytes for array in results if array.in_hbm and array.shape)
    if kind in SLICES:
        return Traffic(results[0].nbytes if whole[0] else 0, written)
    return Traffic(sum(whole), written)


# -- fusions ---------------------------------------------------------------------------------------


def _fusion(
    computations: Mapping[str, Computation], around: Computation, each: Instruction
) -> Traffic:
    inside = computations.get(each.called[0], {}) if each.called else {}
    root = next((i for i in inside.values() if i.root), None)
    if root is None:
        return Traffic(0, 0)
    if _target(root, "AsyncCollectiveStart"):
        operands = [around[name] for name in each.operands if name in around]
        passed = len(operands)  # (operands, result, flags)
        results = [a for a in each.arrays[passed:] if a.in_hbm]
        return Traffic(sum(o.hbm_bytes for o in operands), sum(a.nbytes for a in results))
    reading = _Reading(computations, inside)
    read = 0
    for place, name in enumerate(each.operands):
        operand, inner = around.get(name), _parameter(inside, place)
        if operand is None or inner is None or not operand.hbm_bytes:
            continue
        array = operand.arrays[0]
        read += reading.needed(inner) * WIDTHS[array.dtype]
    outputs = root.operands if root.kind == "tuple" else (root.name,)
    written = 0
    for array, name in zip(each.arrays, outputs, strict=False):
        if array.in_hbm:
            part = _written_in_place(computations, inside, name)
            written += array.nbytes if part is None else part.nbytes
    return Traffic(read, written)


class _Reading:
    """The elements that a fused computation needs of its arrays.

    Args:
        of_root: the elements of its result that are used; None for all.
    """

    def __init__(
        self,
        computations: Mapping[str, Computation],
        inside: Computation,
        of_root: int | None = None,
    ) -> None:
        self.computations, self.inside, self.of_root = computations, inside, of_root
        self._known: dict[str, int] = {}
        self._users: dict[str, list[Instruction]] = {}
        for each in inside.values():
            if each.kind not in ("parameter", "constant"):
                for name in dict.fromkeys(each.operands):
                    self._users.setdefault(name, []).append(each)

    def needed(self, name: str) -> int:
        """Return the elements that are read of an array, at most all of them."""
        if name not in self._known:
            array = self.inside[name]
            total = sum(self._by(user, name) for user in self._users.get(name, []))
            if array.root and self.of_root is not None:
                total += self.of_root
            elif array.root and not self._is_in_place(name):
                total += array.elements
            self._known[name] = min(total, array.elements)
        return self._known[name]

    def _by(self, user: Instruction, name: str) -> int:
        """Return the elements that one user needs."""
        array, first = self.inside[name], user.operands[0] == name
        if _moves_asynchronously(user):
            return 0  # it counts where it starts
        if user.kind == "tuple":
            return 0 if self._is_in_place(name) else array.elements
        if user.kind in UPDATES and first:
            return 0 if self._reaches_root(user) else self.needed(user.name)
        if user.kind in SLICES and first:
            return min(user.elements, self.needed(user.name))
        if user.kind == "fusion":
            return self._by_fusion(user, name)
        if user.kind in _ELEMENTWISE and user.elements == array.elements:
            return self.needed(user.name)
        return array.elements

    def _by_fusion(self, user: Instruction, name: str) -> int:
        inside = self.computations.get(user.called[0], {}) if user.called else {}
        one = len(user.arrays) == 1
        reading = _Reading(self.computations, inside, self.needed(user.name) if one else None)
        total = 0
        for place, operand in enumerate(user.operands):
            inner = _parameter(inside, place)
            if operand == name:
                total += self.inside[name].elements if inner is None else reading.needed(inner)
        return total

    def _is_in_place(self, name: str) -> bool:
        return _written_in_place(self.computations, self.inside, name) is not None

    def _reaches_root(self, update: Instruction) -> bool:
        """Return True if an update is (a part of) the computation's result."""
        if update.root:
            return True
        passes = ("tuple", "bitcast", *UPDATES)
        users = self._users.get(update.name, [])
        return bool(users) and all(u.kind in passes and self._reaches_root(u) for u in users)


class _Part(NamedTuple):
    """The part of an array that is written in place: its bytes, and the parameter written over."""

    nbytes: int
    parameter: str


def _written_in_place(
    computations: Mapping[str, Computation], inside: Computation, name: str
) -> _Part | None:
    """Return what a fused computation writes of its output over one of its parameters; None if it
    writes all of a new array."""
    each = inside[name]
    if each.kind == "parameter":
        return _Part(0, name)
    if each.kind == "bitcast":
        return _written_in_place(computations, inside, each.operands[0])
    if each.kind in UPDATES:
        base = _written_in_place(computations, inside, each.operands[0])
        update = inside[each.operands[UPDATES[each.kind]]]
        return None if base is None else _Part(base.nbytes + update.nbytes, base.parameter)
    if each.kind == "fusion" and each.called:
        inner = computations.get(each.called[0], {})
        root = next((i.name for i in inner.values() if i.root and i.kind != "tuple"), None)
        part = None if root is None else _written_in_place(computations, inner, root)
        if part is None:
            return None
        place = int(inner[part.parameter].operands[0])
        base = _written_in_place(computations, inside, each.operands[place])
        return None if base is None else _Part(base.nbytes + part.nbytes, base.parameter)
    if _target(each, "AsyncCollectiveDone"):
        return _written_in_place(computations, inside, each.operands[1])
    if _moves_asynchronously(each):  # into a buffer that a parameter holds
        return _Part(0, "")
    return None


def _moves_asynchronously(each: Instruction) -> bool:
    """Return True for a collective that a fusion carries, and for its end."""
    carried = each.kind in COLLECTIVES and "async_collective_fusion_config" in each.rest
    return carried or _target(each, "AsyncCollectiveDone")


def _target(each: Instruction, name: str) -> bool:
    return each.kind == "custom-call" and f'"{name}"' in each.rest


def _parameter(inside: Computation, place: int) -> str | None:
    """Return the name of a fusion's parameter."""
    named = (i.name for i in inside.values() if i.kind == "parameter")
    return next((name for name in named if inside[name].operands == (str(place),)), None)
