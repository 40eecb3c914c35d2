"""Parser of a compiled XLA program (HLO text), which counts runs, operations and bytes.

Text -> instructions by computation -> runs of each computation (a loop's body runs as often as its
condition says) -> sums over instructions, each weighted by the runs of its computation.

The compiler's own cost analysis counts a loop's body once, and with layers in a loop that is
nearly all of a step. TPU programs differ from textbook HLO in a few ways that are undone here: a
collective that overlaps with computation appears in several fusions and is one by its channel; a
reduce-scatter can be a fusion around an all-reduce; a matrix product is a convolution whose batch
dims are window dims; a loop counter of 64 bits is two of 32.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

WIDTHS = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2}
WIDTHS |= {"s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8, "f8e4m3fn": 1, "f8e5m2": 1}
COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "ragged-all-to-all",
)
_ARRAY = re.compile(r"\b(" + "|".join(WIDTHS) + r")\[([\d,]*)\](\{[^}]*\})?")
_OPENING = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_NAME = re.compile(r"^\s*(ROOT )?%([\w.\-]+) = ")
_CALLED = re.compile(r"\b(?:calls|to_apply|called_computations)=\{?%?([\w.\-]+)")


@dataclass(frozen=True)
class Array:
    """One array of a result."""

    dtype: str
    shape: tuple[int, ...]
    in_hbm: bool  # else in a memory on the core, which costs no traffic

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.elements * WIDTHS[self.dtype]


@dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    kind: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    rest: str  # everything after the operands
    root: bool

    def attribute(self, name: str) -> str | None:
        """Return the value of `name=value` or `name={value}`, as text."""
        found = re.search(rf"\b{name}=(?:\{{([^}}]*)\}}|%?([\w.\-]+))", self.rest)
        return None if found is None else found.group(1) if found.group(1) else found.group(2)

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.arrays)


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


@dataclass(frozen=True)
class Collective:
    """A collective, once for its place in the program."""

    kind: str
    runs: int  # in one step
    payload: int  # bytes: of the whole that is gathered, reduced or exchanged, on one chip
    dtype: str
    where: str  # its purpose, as named by the traced program


class Program:
    """A parsed program.

    Args:
        text: HLO as XLA prints it, partitioned: all numbers are of one chip.
    """

    def __init__(self, text: str) -> None:
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.entry = ""
        current: dict[str, Instruction] | None = None
        for line in text.splitlines():
            opening = _OPENING.match(line)
            if opening:
                current = self.computations[opening.group(2)] = {}
                self.entry = opening.group(2) if opening.group(1) else self.entry
            elif line.startswith("}"):
                current = None
            elif current is not None:
                instruction = _instruction(line)
                if instruction is not None:
                    current[instruction.name] = instruction

    def instructions(self) -> Iterator[tuple[str, Instruction]]:
        """Yield (computation, instruction) of every executed instruction."""
        for name in self.runs:
            for instruction in self.computations[name].values():
                yield name, instruction

    @cached_property
    def runs(self) -> Counter[str]:
        """The number of runs of each computation in one step."""
        found: Counter[str] = Counter()

        def visit(name: str, times: int) -> None:
            found[name] += times
            for called, more in self._calls(name):
                if called in self.computations:
                    visit(called, times * more)

        visit(self.entry, 1)
        return found

    def _calls(self, name: str) -> Iterator[tuple[str, int]]:
        for instruction in self.computations[name].values():
            if instruction.kind == "while":
                body = instruction.attribute("body") or ""
                yield body, self.trips(instruction)
                continue
            # A comparison or sum that a reduction applies is no computation by itself.
            if instruction.kind in ("fusion", "call", "async-start", "custom-call"):
                for called in _CALLED.findall(instruction.rest):
                    yield called, 1
            for called in (instruction.attribute("branch_computations") or "").split(","):
                yield called.strip().lstrip("%"), 1

    @cached_property
    def loops(self) -> list[int]:
        """The trips of each loop, outermost first in program order."""
        return [self.trips(i) for _, i in self.instructions() if i.kind == "while"]

    def trips(self, loop: Instruction) -> int:
        """Return the trips of a counted loop: the limit of its counter over its step."""
        condition = self.computations[loop.attribute("condition") or ""]
        body = self.computations[loop.attribute("body") or ""]
        best = 1
        for each in condition.values():
            if each.kind != "compare" or each.attribute("direction") not in ("LT", "GT"):
                continue
            limits = [_constant(condition, name) for name in each.operands]
            limit = next((value for value in limits if value is not None), None)
            places = [_place(condition, name) for name in each.operands]
            place = next((value for value in places if value is not None), None)
            if limit is not None and limit > 0 and place is not None:
                best = max(best, limit // _step(body, place))
        return best

    # -- sums ----------------------------------------------------------------------------------

    def collectives(self) -> list[Collective]:
        """Return every collective, an asynchronous one once, with its runs in one step."""
        callers = self._callers()
        found: dict[tuple[str, str, str], Collective] = {}
        for computation, each in self.instructions():
            kind = each.kind.removesuffix("-start")
            if kind not in COLLECTIVES or not each.arrays:
                continue
            scatters = kind == "all-reduce" and "reduce-scatter" in computation
            kind = "reduce-scatter" if scatters or kind == "reduce-scatter" else kind
            place = computation
            while place in callers:
                place = callers[place]
            sizes = [array.nbytes for array in each.arrays]
            # The result of a start is (operands, results, ...): the larger is the whole.
            payload = max(sizes) if each.kind.endswith("-start") else sum(sizes)
            if each.kind == "reduce-scatter":  # its result is a part; its operand is the whole
                payload *= _group_size(each)
            channel = each.attribute("channel_id") or each.name
            where = (re.findall(r'op_name="([^"]*)"', each.rest) or [""])[0]
            one = Collective(kind, self.runs[place], payload, each.arrays[0].dtype, where)
            found.setdefault((kind, channel, place), one)
        return list(found.values())

    def _callers(self) -> dict[str, str]:
        """Return, for each fused computation, the computation that contains its fusion."""
        return {
            called: computation
            for computation, each in self.instructions()
            if each.kind in ("fusion", "async-start")
            for called in _CALLED.findall(each.rest)
        }

    def product_flops(self) -> int:
        """Return the operations of all matrix products in one step; those inside kernels are not
        visible here."""
        total = 0
        for computation, each in self.instructions():
            if each.kind == "convolution":
                total += self.runs[computation] * self._convolution(computation, each)
            elif each.kind == "dot":
                total += self.runs[computation] * self._dot(computation, each)
        return total

    def _operand(self, computation: str, name: str) -> Array:
        return self.computations[computation][name].arrays[0]

    def _dot(self, computation: str, each: Instruction) -> int:
        left = self._operand(computation, each.operands[0])
        dims = (each.attribute("lhs_contracting_dims") or "").split(",")
        inner = math.prod(left.shape[int(dim)] for dim in dims if dim)
        return 2 * each.arrays[0].elements * inner

    def _convolution(self, computation: str, each: Instruction) -> int:
        """Return two operations for every pair of an output position and a kernel tap that overlap
        inside."""
        left, right = (self._operand(computation, name).shape for name in each.operands[:2])
        out = each.arrays[0].shape
        labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", each.rest)
        assert labels is not None
        in_, kernel, result = labels.groups()
        window = dict(part.split("=") for part in (each.attribute("window") or "").split())
        spatial = [label for label in in_ if label.isdigit()]
        pairs = 1
        for number, label in enumerate(spatial):
            pairs *= _meeting(
                left[in_.index(label)], out[result.index(label)], _window(window, number)
            )
        return (
            2 * pairs * out[result.index("b")] * out[result.index("f")] * right[kernel.index("i")]
        )

    def kernels(self) -> Counter[str]:
        """Return the calls of custom kernels in one step, by name."""
        found: Counter[str] = Counter()
        for computation, each in self.instructions():
            if each.kind == "custom-call" and '"tpu_custom_call"' in each.rest:
                name = re.search(r"kernel_name\W+([\w.\-]+)", each.rest)
                found[name.group(1) if name else each.name.split(".")[0]] += self.runs[computation]
        return found

    def count(self, kind: str) -> int:
        """Return the number of instructions of a kind in the program."""
        return sum(each.kind == kind for _, each in self.instructions())

    def hbm_bytes(self) -> int:
        """Return the bytes read and written outside fusions in one step, an upper estimate.

        A fusion reads each operand once and writes its result; of an operand that it only slices it
        reads the slice, and an operand that it updates in place it writes in part.
        """
        fused = set(self._callers())
        total = 0
        for computation, each in self.instructions():
            if computation in fused or each.kind in _NO_TRAFFIC:
                continue
            total += self.runs[computation] * self._traffic(computation, each)
        return total

    def _traffic(self, computation: str, each: Instruction) -> int:
        if each.kind == "slice-start":  # (the whole, the slice, ...)
            return each.arrays[1].nbytes * (1 + each.arrays[1].in_hbm)
        inside = self.computations.get(each.attribute("calls") or "", {})
        here = self.computations[computation]
        reads, updated = 0, False
        for place, name in enumerate(each.operands):
            operand = here.get(name)
            if operand is None:
                continue
            whole = sum(array.nbytes for array in operand.arrays if array.in_hbm)
            inner = _parameter(inside, place)
            part = None if inner is None else self._sliced(inside, inner)
            if each.kind in ("dynamic-slice", "dynamic-update-slice") and place == 0:
                part = 0
            if part is not None and part < whole and inner and self._writes_into(inside, inner):
                updated = True
            reads += whole if part is None else min(part, whole)
        writes = sum(array.nbytes for array in each.arrays if array.in_hbm)
        if each.kind == "dynamic-update-slice" or updated:
            writes = min(writes, reads)
        return reads + writes

    def _sliced(self, inside: Mapping[str, Instruction], name: str) -> int | None:
        """Return the bytes that a fusion, with those inside it, reads of an array it only slices or
        updates; None if it reads all."""
        total = 0
        for user in _users(inside, name):
            if user.kind == "dynamic-slice":
                parts: list[int | None] = [user.nbytes]
            elif user.kind == "dynamic-update-slice":
                update = inside.get(user.operands[1])
                parts = [update.nbytes if update is not None else 0]
            elif user.kind == "bitcast" or "calls=%copy_fusion" in user.rest:  # another tiling
                parts = [self._sliced(inside, user.name)]
            else:
                parts = [self._sliced(*each) for each in self._nested(user, name)] or [None]
            known = [part for part in parts if part is not None]
            if len(known) < len(parts):
                return None
            total += sum(known)
        return total

    def _writes_into(self, inside: Mapping[str, Instruction], name: str) -> bool:
        return any(
            user.kind == "dynamic-update-slice"
            or any(self._writes_into(*each) for each in self._nested(user, name))
            for user in _users(inside, name)
        )

    def _nested(
        self, user: Instruction, name: str
    ) -> Iterator[tuple[Mapping[str, Instruction], str]]:
        """Yield a nested fusion's computation, and in it the name of each parameter that is the
        named array."""
        inside = self.computations.get(user.attribute("calls") or "", {})
        for place, operand in enumerate(user.operands):
            inner = _parameter(inside, place)
            if operand == name and inner is not None:
                yield inside, inner


_NO_TRAFFIC = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional",
    "call", "after-all", "partition-id", "replica-id", "async-done", "async-update", "copy-done",
    "slice-done",
    "all-gather-done", "all-reduce-done", "collective-permute-done", "optimization-barrier",
}  # fmt: skip


def _parameter(inside: Mapping[str, Instruction], place: int) -> str | None:
    """Return the name of a fusion's parameter."""
    named = (i.name for i in inside.values() if i.kind == "parameter")
    return next((name for name in named if inside[name].operands == (str(place),)), None)


def _users(inside: Mapping[str, Instruction], name: str) -> list[Instruction]:
    return [i for i in inside.values() if i.kind != "parameter" and name in i.operands]


def _constant(computation: dict[str, Instruction], name: str) -> int | None:
    found = computation.get(name)
    if found is None or found.kind != "constant" or not re.fullmatch(r"-?\d+", found.operands[0]):
        return None
    return int(found.operands[0])


def _place(computation: dict[str, Instruction], name: str) -> int | None:
    found = computation.get(name)
    if found is None or found.kind != "get-tuple-element":
        return None
    return int(found.attribute("index") or 0)


def _step(body: dict[str, Instruction], place: int) -> int:
    """Return the increment of a loop's counter in one pass."""
    for each in body.values():
        if each.kind == "add" and any(_place(body, name) == place for name in each.operands):
            steps = [_constant(body, name) for name in each.operands]
            step = next((value for value in steps if value), None)
            if step:
                return step
    return 1


def _group_size(each: Instruction) -> int:
    """Return the number of chips that take part, from either notation of groups."""
    lists = re.search(r"replica_groups=\{\{([\d,]*)\}", each.rest)
    if lists:
        return lists.group(1).count(",") + 1
    compact = re.search(r"replica_groups=\[\d+,(\d+)\]", each.rest)
    return int(compact.group(1)) if compact else 1


def _window(window: dict[str, str], number: int) -> tuple[int, int, int, int, int]:
    """Return size, stride, padding before, dilation of the left side and of the kernel, of one
    dim."""

    def of(key: str, default: str) -> str:
        return window[key].split("x")[number] if key in window else default

    return (
        int(of("size", "1")),
        int(of("stride", "1")),
        int(of("pad", "0_0").split("_")[0]),
        int(of("lhs_dilate", "1")),
        int(of("rhs_dilate", "1")),
    )


def _meeting(length: int, outputs: int, window: tuple[int, int, int, int, int]) -> int:
    """Return the pairs of output position and kernel tap that fall on an element, not on padding or
    a gap."""
    size, stride, before, left_gap, kernel_gap = window
    last = (length - 1) * left_gap
    return sum(
        0 <= place <= last and place % left_gap == 0
        for out in range(outputs)
        for place in (out * stride + tap * kernel_gap - before for tap in range(size))
    )
