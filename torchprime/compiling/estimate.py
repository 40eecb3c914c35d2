"""The report's estimate of a step's time, by published speeds and by the compiler's own cycles."""

from __future__ import annotations

from typing import Any

from torchprime.compiling.hlo.program import Program
from torchprime.compiling.hlo.schedule import Operation, Schedule
from torchprime.compiling.theory import Sizes, kernel_flops
from torchprime.config.topologies import Chip

MOST_OPERATIONS = 20


def estimate(program: Program, chip: Chip, sizes: Sizes) -> dict[str, Any]:
    """Return the estimate of a step.

    Returns:
        `step_s`, its parts by what the core was `bound_by_s` (`wait`: for transfers), the seconds
        of compute, HBM and links `alone_s`, those of the core's operations one by one without any
        transfer (`operations_s`), the `compiler`'s cycles of the operations that have
        them, at the chip's clock, the `longest` operations, and slot tokens per second and chip.
    """
    kernels = kernel_flops(program.kernels(), sizes)
    schedule = Schedule(program, chip, kernels.__getitem__)
    spent = schedule.step()
    step = sum(spent.values())
    operations = sorted(schedule.operations.values(), key=_longest, reverse=True)
    return {
        "step_s": step,
        "bound_by_s": spent,
        "alone_s": schedule.total._asdict(),
        "operations_s": schedule.one_by_one,
        "hbm_bytes": program.hbm_bytes(),
        "slot_tokens_per_s_per_chip": sizes.tokens / sizes.tensor / step,
        "compiler": {
            "cycles": schedule.cycles,
            "clock_hz": chip.clock_hz,
            "seconds": schedule.cycles / chip.clock_hz,
        },
        "longest": [_entry(each, chip) for each in operations[:MOST_OPERATIONS]],
    }


def _longest(each: Operation) -> float:
    return each.runs * each.seconds.longest


def _entry(each: Operation, chip: Chip) -> dict[str, Any]:
    """Return an operation for the report; seconds are of all its runs in one step."""
    cycles = each.cycles
    return {
        "name": each.name.split("_block")[0],
        "purpose": each.purpose,
        "runs": each.runs,
        **{f"{kind}_s": each.runs * s for kind, s in each.seconds._asdict().items()},
        "compiler_s": None if cycles is None else each.runs * cycles / chip.clock_hz,
    }
