"""A compiled program: its instructions, the runs of each, and sums over a step.

Text -> instructions by computation -> runs of each computation (a loop's body runs as often as its
condition says) -> sums over instructions, each weighted by the runs of its computation.

The compiler's own cost analysis counts a loop's body once, and with layers in a loop that is
nearly all of a step. TPU programs differ from textbook HLO in a few ways that are undone in this
folder: a collective that overlaps with computation appears in several fusions and is one by its
channel; a reduce-scatter can be a fusion around an all-reduce; a matrix product is a convolution
whose batch dims are window dims; a loop counter of 64 bits is two of 32.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from functools import cached_property

from torchprime.compiling.hlo import loops
from torchprime.compiling.hlo.collectives import Collective, as_collective
from torchprime.compiling.hlo.memory import Traffic, hbm_traffic
from torchprime.compiling.hlo.parsing import Instruction, parse
from torchprime.compiling.hlo.products import product_flops

# Instructions that stand for the instructions of a computation.
CONTAINERS = ("while", "conditional", "call")
FUSIONS = ("fusion", "async-start")


class Program:
    """A parsed program.

    Args:
        text: HLO as XLA prints it, partitioned: all numbers are of one chip.
    """

    def __init__(self, text: str) -> None:
        self.computations, self.entry = parse(text)

    def instructions(self) -> Iterator[tuple[str, Instruction]]:
        """Yield (computation, instruction) of every executed instruction, those in fusions too."""
        for name in self.runs:
            for instruction in self.computations[name].values():
                yield name, instruction

    def operations(self) -> Iterator[tuple[str, Instruction]]:
        """Yield (computation, instruction) of what the chip executes one after the other: a fusion
        is one operation, a loop those of its body."""
        for name, instruction in self.instructions():
            if name not in self.callers and instruction.kind not in CONTAINERS:
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
                yield instruction.attribute("body") or "", self.trips(name, instruction)
                continue
            # A comparison or sum that a reduction applies is no computation by itself.
            if instruction.kind in (*FUSIONS, "call", "custom-call"):
                for called in instruction.called:
                    yield called, 1
            for called in branches(instruction):
                yield called, 1

    @cached_property
    def callers(self) -> dict[str, str]:
        """For each fused computation, the computation that contains its fusion."""
        return {
            called: computation
            for computation, each in self.instructions()
            if each.kind in FUSIONS
            for called in each.called
        }

    @cached_property
    def loops(self) -> list[int]:
        """The trips of each loop, outermost first in program order."""
        return [self.trips(name, i) for name, i in self.instructions() if i.kind == "while"]

    def trips(self, computation: str, loop: Instruction) -> int:
        """Return the passes of a loop that this computation contains."""
        return loops.trips(self.computations, self.computations[computation], loop)

    # -- of one instruction --------------------------------------------------------------------

    def traffic(self, computation: str, each: Instruction) -> Traffic:
        """Return the bytes of one run of an operation in the chip's memory."""
        return hbm_traffic(self.computations, self.computations[computation], each)

    def flops(self, computation: str, each: Instruction) -> int:
        """Return the operations of one run in matrix products, with those that it calls."""
        return product_flops(self.computations, self.computations[computation], each)

    # -- sums over a step ----------------------------------------------------------------------

    def collectives(self) -> list[Collective]:
        """Return every collective, an asynchronous one once, with its runs in one step."""
        found: dict[tuple[str, str, str], Collective] = {}
        for computation, each in self.instructions():
            place = computation
            while place in self.callers:
                place = self.callers[place]
            one = as_collective(computation, each, self.runs[place])
            if one is not None:
                found.setdefault((one.kind, one.channel, place), one)
        return list(found.values())

    def product_flops(self) -> int:
        """Return the operations of all matrix products in one step; those inside kernels are not
        visible here."""
        return sum(self.runs[name] * self.flops(name, each) for name, each in self.operations())

    def hbm_bytes(self) -> int:
        """Return the bytes that the operations of one step read and write in the chip's memory."""
        total = 0
        for name, each in self.operations():
            traffic = self.traffic(name, each)
            total += self.runs[name] * (traffic.read + traffic.written)
        return total

    def kernels(self) -> Counter[str]:
        """Return the calls of custom kernels in one step, by name."""
        found: Counter[str] = Counter()
        for computation, each in self.instructions():
            name = kernel_name(each)
            if name is not None:
                found[name] += self.runs[computation]
        return found

    def count(self, kind: str) -> int:
        """Return the number of instructions of a kind in the program."""
        return sum(each.kind == kind for _, each in self.instructions())


def branches(each: Instruction) -> list[str]:
    """Return the names of a conditional's computations."""
    found = (each.attribute("branch_computations") or "").split(",")
    return [name.strip().lstrip("%") for name in found if name.strip()]


def kernel_name(each: Instruction) -> str | None:
    """Return the name of a custom kernel, None for another instruction."""
    if each.kind != "custom-call" or '"tpu_custom_call"' not in each.rest:
        return None
    name = re.search(r"kernel_name\W+([\w.\-]+)", each.rest)
    return name.group(1) if name else each.name.split(".")[0]
