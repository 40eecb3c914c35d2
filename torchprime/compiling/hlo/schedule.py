"""Time of a program by published speeds: each operation's, and the step's in program order.

A scheduled program's text has its operations in the order in which a core starts them. Each takes
the longest of three times: its matrix products at the chip's peak, its bytes in HBM, and its bytes
over the links. Between the start and the end of an asynchronous transfer, the transfer uses what
the operations leave of HBM and links; at its end the core waits for the rest of it.

This is a lower bound of what a chip needs: operations that are no products cost only their memory
traffic, kernels run at the peak, and nothing has a latency.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from torchprime.compiling.hlo.collectives import (
    COLLECTIVES,
    Collective,
    as_collective,
)
from torchprime.compiling.hlo.memory import Traffic
from torchprime.compiling.hlo.parsing import Instruction
from torchprime.compiling.hlo.program import Program, branches, kernel_name
from torchprime.config.topologies import Chip

_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_NO_CYCLES = 2**63 - 1  # the compiler's number for an operation that it cannot estimate


class Seconds(NamedTuple):
    """The times of an operation, each as if the others cost nothing."""

    compute: float = 0.0
    hbm: float = 0.0
    ici: float = 0.0

    @property
    def longest(self) -> float:
        return max(self)

    @property
    def bound(self) -> str:
        """The name of the longest time."""
        return max(self._fields, key=lambda name: getattr(self, name))


@dataclass(frozen=True)
class Operation:
    """An operation of the program with what it costs in one run."""

    name: str
    purpose: str  # as named by the traced program
    runs: int  # in one step
    flops: int
    traffic: Traffic
    crossing: int  # bytes that leave the chip over its links
    cycles: int | None  # by the compiler; None for kernels, transfers, SparseCores
    seconds: Seconds
    is_transfer: bool = False  # a collective, or the start of an asynchronous one or of a copy


class Clock:
    """The time of a core with two kinds of transfer beside it: in HBM and over the links.

    Attributes:
        spent: seconds by what the core was bound by, `wait` for the end of a transfer.
    """

    def __init__(self) -> None:
        self.spent = dict.fromkeys((*Seconds._fields, "wait"), 0.0)
        self._under_way: list[tuple[str, list[float]]] = []  # in the order of their starts

    def work(self, cost: Seconds) -> None:
        """Let the core do an operation; transfers use what it leaves of HBM and links."""
        self.spent[cost.bound] += cost.longest
        self._advance(cost.longest, cost)

    def start(self, key: str, cost: Seconds) -> None:
        """Start a transfer."""
        self._under_way.append((key, [cost.hbm, cost.ici]))

    def wait(self, key: str) -> None:
        """Let the core wait for the end of a transfer. Those before it go first."""
        places = [place for place, (name, _) in enumerate(self._under_way) if name == key]
        if places:
            self._wait_for(places[0] + 1)
            del self._under_way[places[0]]

    def finish(self) -> None:
        """Wait for all transfers."""
        self._wait_for(len(self._under_way))
        self._under_way.clear()

    def _wait_for(self, count: int) -> None:
        left = [sum(each[kind] for _, each in self._under_way[:count]) for kind in (0, 1)]
        self.spent["wait"] += max(left)
        self._advance(max(left), Seconds())

    def _advance(self, duration: float, cost: Seconds) -> None:
        for kind, free in enumerate((duration - cost.hbm, duration - cost.ici)):
            for _, left in self._under_way:
                done = min(free, left[kind])
                left[kind] -= done
                free -= done


class _Act(NamedTuple):
    """The effect of an instruction on a clock."""

    verb: str  # "work", "start" or "wait" for a transfer, "run" a computation
    name: str
    times: int = 1
    cost: Seconds = Seconds()


def _cycles(each: Instruction) -> int | None:
    found = _CYCLES.search(each.rest)
    cycles = _NO_CYCLES if found is None else int(found.group(1))
    return None if cycles == _NO_CYCLES else cycles


class Schedule:
    """A program's operations and their times on a chip.

    Args:
        kernel_flops: the operations of one call of a custom kernel, by its name.
    """

    def __init__(self, program: Program, chip: Chip, kernel_flops: Callable[[str], int]) -> None:
        self.program, self.chip, self._kernel_flops = program, chip, kernel_flops
        self._acts: dict[str, list[_Act]] = {}  # by computation

    @cached_property
    def operations(self) -> dict[str, Operation]:
        """The operations that cost anything, by name."""
        found = (self._operation(*each) for each in self.program.operations())
        return {each.name: each for each in found if each.seconds.longest or each.cycles}

    @cached_property
    def total(self) -> Seconds:
        """The times of all operations of a step, each summed as if the others cost nothing."""
        all_ = self.operations.values()
        sums = (sum(each.runs * each.seconds[kind] for each in all_) for kind in range(3))
        return Seconds(*sums)

    @property
    def one_by_one(self) -> float:
        """The seconds of the core's operations in a step, each the longer of compute and HBM;
        without collectives and asynchronous transfers."""
        return sum(
            each.runs * max(each.seconds.compute, each.seconds.hbm)
            for each in self.operations.values()
            if not each.is_transfer
        )

    @property
    def cycles(self) -> int:
        """The compiler's own estimate of a step: the cycles of all operations that have one."""
        return sum(each.runs * (each.cycles or 0) for each in self.operations.values())

    def step(self) -> dict[str, float]:
        """Return the seconds of a step, with transfers beside the operations where they are
        asynchronous: bound by `compute`, `hbm` and `ici`, and in `wait` for transfers."""
        clock = Clock()
        self._run(self.program.entry, clock)
        clock.finish()
        return clock.spent

    def _operation(self, computation: str, each: Instruction) -> Operation:
        traffic = self.program.traffic(computation, each)
        flops = self.program.flops(computation, each)
        kernel = kernel_name(each)
        flops += 0 if kernel is None else self._kernel_flops(kernel)
        crossing = sum(one.crossing for one in self._own_collectives(computation, each))
        return Operation(
            each.name,
            each.purpose,
            self.program.runs[computation],
            flops,
            traffic,
            crossing,
            _cycles(each),
            Seconds(
                flops / self.chip.flops,
                sum(traffic) / self.chip.hbm_bytes_per_s,
                crossing / self.chip.ici_bytes_per_s,
            ),
            each.kind.endswith("-start") or each.kind in COLLECTIVES or self._begins(each),
        )

    # -- collectives ---------------------------------------------------------------------------

    def _collectives(self, computation: str, each: Instruction) -> Iterator[Collective]:
        """Yield the collectives of an operation, those in its fusions too."""
        one = as_collective(computation, each, 1)
        if one is not None:
            yield one
        for name in each.called if each.kind in ("fusion", "async-start") else ():
            for inner in self.program.computations.get(name, {}).values():
                yield from self._collectives(name, inner)

    def _own_collectives(self, computation: str, each: Instruction) -> list[Collective]:
        """Return the collectives that an operation does or starts, without those that it carries
        for another one or ends."""
        found = list(self._collectives(computation, each))
        carried = set() if self._begins(each) else self._asynchronous
        return [one for one in found if one.channel not in carried]

    @cached_property
    def _asynchronous(self) -> set[str]:
        """The channels of collectives that a fusion starts and another one ends."""
        return {
            one.channel
            for name, each in self.program.operations()
            if self._begins(each)
            for one in self._collectives(name, each)
        }

    def _begins(self, each: Instruction) -> bool:
        return self._root_calls(each, "AsyncCollectiveStart")

    def _root_calls(self, each: Instruction, target: str) -> bool:
        inside = self.program.computations.get(each.called[0], {}) if each.called else {}
        return each.kind == "fusion" and any(
            i.root and i.kind == "custom-call" and f'"{target}"' in i.rest for i in inside.values()
        )

    # -- in order ------------------------------------------------------------------------------

    def _run(self, computation: str, clock: Clock) -> None:
        if computation not in self._acts:
            instructions = self.program.computations[computation].values()
            self._acts[computation] = [
                act for each in instructions for act in self._acts_of(computation, each)
            ]
        for act in self._acts[computation]:
            if act.verb == "run":
                for _ in range(act.times):
                    self._run(act.name, clock)
            elif act.verb == "start":
                clock.start(act.name, act.cost)
            elif act.verb == "wait":
                clock.wait(act.name)
            else:
                clock.work(act.cost)

    def _acts_of(self, computation: str, each: Instruction) -> Iterator[_Act]:
        """Yield the effects of an instruction on a clock, in order."""
        operation = self.operations.get(each.name)
        if each.kind == "while":
            yield _Act("run", each.attribute("body") or "", self.program.trips(computation, each))
        elif each.kind in ("call", "conditional"):
            for name in each.called if each.kind == "call" else branches(each):
                yield _Act("run", name)
        elif each.kind.endswith("-done"):
            yield _Act("wait", each.operands[0])
        elif self._root_calls(each, "AsyncCollectiveDone"):
            for name in sorted({one.channel for one in self._collectives(computation, each)}):
                yield _Act("wait", f"channel {name}")
        elif operation is not None and self._begins(each):
            (first, *_) = self._collectives(computation, each)
            yield _Act("start", f"channel {first.channel}", cost=operation.seconds)
        elif operation is not None and each.kind.endswith("-start"):
            yield _Act("start", each.name, cost=operation.seconds)
        elif operation is not None:
            yield _Act("work", each.name, cost=operation.seconds)
