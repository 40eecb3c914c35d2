"""Time of a small program, counted by hand.

The chip takes a second for a product of 64 x 64 x 64 and for an array A, bf16[64,64], in HBM or
over its links. Most arrays are on the core, S(1), and cost no traffic.
"""

from __future__ import annotations

import pytest

from torchprime.compiling.hlo.program import Program
from torchprime.compiling.hlo.schedule import Clock, Schedule, Seconds
from torchprime.config.topologies import Chip

A = 64 * 64 * 2
CHIP = Chip("small", 2**30, 2 * 64**3, A, A, clock_hz=100)

# ruff: noqa: E501
PROGRAM = """HloModule step, is_scheduled=true

%add (a: bf16[], b: bf16[]) -> bf16[] {
  %a = bf16[] parameter(0)
  %b = bf16[] parameter(1)
  ROOT %add.1 = bf16[] add(%a, %b)
}

%cut (s: bf16[3,64,64], i: s32[]) -> bf16[64,64] {
  %s = bf16[3,64,64]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %one = bf16[1,64,64]{2,1,0} dynamic-slice(%s, %i), dynamic_slice_sizes={1,64,64}
  ROOT %flat = bf16[64,64]{1,0} bitcast(%one)
}

%layer (x: bf16[128,64], w: bf16[3,64,64], k: s32[]) -> bf16[128,64] {
  %x = bf16[128,64]{1,0} parameter(0)
  %w = bf16[3,64,64]{2,1,0} parameter(1)
  %k = s32[]{:S(6)} parameter(2)
  %weight = bf16[64,64]{1,0} fusion(%w, %k), kind=kLoop, calls=%cut
  ROOT %dot = bf16[128,64]{1,0} dot(%x, %weight), lhs_contracting_dims={1}, rhs_contracting_dims={1}
}

%starts (g: bf16[64,64]) -> (bf16[64,64], bf16[4,64,64], u32[]) {
  %g = bf16[64,64]{1,0} parameter(0)
  %all-gather.1 = bf16[4,64,64]{2,1,0} all-gather(%g), channel_id=1, replica_groups=[1,4]<=[4], dimensions={0}, backend_config={"async_collective_fusion_config":{}}
  ROOT %begun = (bf16[64,64]{1,0}, bf16[4,64,64]{2,1,0}, u32[]{:S(2)}) custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}

%carries (h: bf16[64,64], b: bf16[4,64,64], f: u32[], d: bf16[256,64], v: bf16[64,64]) -> (bf16[256,64], bf16[64,64], bf16[4,64,64], bf16[4,64,64], u32[]) {
  %h = bf16[64,64]{1,0} parameter(0)
  %b = bf16[4,64,64]{2,1,0} parameter(1)
  %f = u32[]{:S(2)} parameter(2)
  %d = bf16[256,64]{1,0} parameter(3)
  %v = bf16[64,64]{1,0} parameter(4)
  %work = bf16[256,64]{1,0} dot(%d, %v), lhs_contracting_dims={1}, rhs_contracting_dims={1}
  %all-gather.2 = bf16[4,64,64]{2,1,0} all-gather(%h), channel_id=1, replica_groups=[1,4]<=[4], dimensions={0}, backend_config={"async_collective_fusion_config":{}}
  ROOT %carried = (bf16[256,64]{1,0:S(1)}, bf16[64,64]{1,0}, bf16[4,64,64]{2,1,0}, bf16[4,64,64]{2,1,0}, u32[]{:S(2)}) tuple(%work, %h, %b, %all-gather.2, %f)
}

%ends (m: bf16[64,64], e: bf16[4,64,64], r: u32[]) -> bf16[4,64,64] {
  %m = bf16[64,64]{1,0} parameter(0)
  %e = bf16[4,64,64]{2,1,0} parameter(1)
  %r = u32[]{:S(2)} parameter(2)
  %all-gather.3 = bf16[4,64,64]{2,1,0} all-gather(%m), channel_id=1, replica_groups=[1,4]<=[4], dimensions={0}, backend_config={"async_collective_fusion_config":{}}
  ROOT %done = bf16[4,64,64]{2,1,0} custom-call(%m, %e, %all-gather.3, %r), custom_call_target="AsyncCollectiveDone"
}

%body (p: (s32[], bf16[128,64], bf16[3,64,64], bf16[64,64])) -> (s32[], bf16[128,64], bf16[3,64,64], bf16[64,64]) {
  %p = (s32[], bf16[128,64]{1,0:S(1)}, bf16[3,64,64]{2,1,0}, bf16[64,64]{1,0}) parameter(0)
  %n = s32[]{:S(6)} get-tuple-element(%p), index=0
  %y = bf16[128,64]{1,0:S(1)} get-tuple-element(%p), index=1
  %stack = bf16[3,64,64]{2,1,0} get-tuple-element(%p), index=2
  %more = bf16[64,64]{1,0} get-tuple-element(%p), index=3
  %copied = (bf16[64,64]{1,0:S(1)}, bf16[64,64]{1,0}, u32[]{:S(2)}) copy-start(%more)
  %next_y = bf16[128,64]{1,0:S(1)} fusion(%y, %stack, %n), kind=kOutput, calls=%layer, backend_config={"window_config":{"estimated_cycles":"300"}}
  %copy-done = bf16[64,64]{1,0:S(1)} copy-done(%copied)
  %splash = bf16[128,64]{1,0:S(1)} custom-call(%next_y, %copy-done), custom_call_target="tpu_custom_call"
  %one.1 = s32[]{:S(6)} constant(1)
  %n.copy = s32[]{:S(6)} copy(%n)
  %n.sum = s32[]{:S(6)} add(%n.copy, %one.1)
  %n.next = s32[]{:S(6)} copy(%n.sum)
  ROOT %out = (s32[], bf16[128,64]{1,0:S(1)}, bf16[3,64,64]{2,1,0}, bf16[64,64]{1,0}) tuple(%n.next, %splash, %stack, %more)
}

%condition (q: (s32[], bf16[128,64], bf16[3,64,64], bf16[64,64])) -> pred[] {
  %q = (s32[], bf16[128,64]{1,0:S(1)}, bf16[3,64,64]{2,1,0}, bf16[64,64]{1,0}) parameter(0)
  %j = s32[]{:S(6)} get-tuple-element(%q), index=0
  %j.copy = s32[]{:S(6)} copy(%j)
  %three = s32[]{:S(6)} constant(3)
  ROOT %smaller = pred[]{:S(6)} compare(%j.copy, %three), direction=LT
}

ENTRY %main (x0: bf16[128,64], w0: bf16[3,64,64], m0: bf16[64,64], d0: bf16[256,64]) -> bf16[64,64] {
  %x0 = bf16[128,64]{1,0:S(1)} parameter(0)
  %w0 = bf16[3,64,64]{2,1,0} parameter(1)
  %m0 = bf16[64,64]{1,0} parameter(2)
  %d0 = bf16[256,64]{1,0:S(1)} parameter(3)
  %zero = s32[]{:S(6)} constant(0)
  %start = (s32[], bf16[128,64]{1,0:S(1)}, bf16[3,64,64]{2,1,0}, bf16[64,64]{1,0}) tuple(%zero, %x0, %w0, %m0)
  %while.1 = (s32[], bf16[128,64]{1,0:S(1)}, bf16[3,64,64]{2,1,0}, bf16[64,64]{1,0}) while(%start), condition=%condition, body=%body
  %begun.1 = (bf16[64,64]{1,0}, bf16[4,64,64]{2,1,0}, u32[]{:S(2)}) fusion(%m0), kind=kCustom, calls=%starts
  %h.1 = bf16[64,64]{1,0} get-tuple-element(%begun.1), index=0
  %b.1 = bf16[4,64,64]{2,1,0} get-tuple-element(%begun.1), index=1
  %f.1 = u32[]{:S(2)} get-tuple-element(%begun.1), index=2
  %near = bf16[64,64]{1,0:S(1)} custom-call(), custom_call_target="AllocateBuffer"
  %carrier = (bf16[256,64]{1,0:S(1)}, bf16[64,64]{1,0}, bf16[4,64,64]{2,1,0}, bf16[4,64,64]{2,1,0}, u32[]{:S(2)}) fusion(%h.1, %b.1, %f.1, %d0, %near), kind=kOutput, calls=%carries, backend_config={"window_config":{"estimated_cycles":"500"}}
  %h.2 = bf16[64,64]{1,0} get-tuple-element(%carrier), index=1
  %b.2 = bf16[4,64,64]{2,1,0} get-tuple-element(%carrier), index=3
  %f.2 = u32[]{:S(2)} get-tuple-element(%carrier), index=4
  %gathered = bf16[4,64,64]{2,1,0} fusion(%h.2, %b.2, %f.2), kind=kCustom, calls=%ends
  ROOT %all-reduce.1 = bf16[64,64]{1,0:S(1)} all-reduce(%near), channel_id=2, replica_groups=[1,4]<=[4], to_apply=%add
}
"""


def kernel_flops(name: str) -> int:
    return {"splash": 64**3}[name]  # half a second


@pytest.fixture(scope="module")
def schedule() -> Schedule:
    return Schedule(Program(PROGRAM), CHIP, kernel_flops)


def test_counts(schedule: Schedule) -> None:
    program = schedule.program
    assert program.loops == [3]  # its counter passes through copies
    layers, carrier = 3 * 2 * 128 * 64 * 64, 2 * 256 * 64 * 64
    assert program.product_flops() == layers + carrier
    copies, slices, gather = 3 * A, 3 * A, A + 4 * A
    assert program.hbm_bytes() == copies + slices + gather
    payloads = {each.kind: (each.payload, each.crossing) for each in program.collectives()}
    # Of four chips, three parts of the whole come from others; sums go round twice.
    assert payloads == {"all-gather": (4 * A, 3 * A), "all-reduce": (A, 2 * A * 3 // 4)}


def test_operations(schedule: Schedule) -> None:
    """In seconds of compute, HBM and links."""
    assert {name: each.seconds for name, each in schedule.operations.items()} == {
        "copied": (0, 1, 0),  # read; written on the core
        "next_y": (2, 1, 0),  # 128 x 64 x 64; the slice of the stack
        "splash": (0.5, 0, 0),
        "begun.1": (0, 5, 3),  # reads A, writes 4 A; 3 of 4 A come from other chips
        "carrier": (4, 0, 0),  # 256 x 64 x 64; the gather counts at its start
        "all-reduce.1": (0, 0, 1.5),  # twice 3/4 of A
    }
    assert {each.name: each.runs for each in schedule.operations.values()}["next_y"] == 3


def test_each_part_alone(schedule: Schedule) -> None:
    compute = 3 * (2 + 0.5) + 4
    hbm = 3 * (1 + 1) + 5
    assert schedule.total == (compute, hbm, 3 + 1.5)
    assert schedule.program.hbm_bytes() == hbm * A


def test_a_step_with_transfers_beside_the_operations(schedule: Schedule) -> None:
    """A pass: the copy takes the second of HBM that the product of two seconds leaves; no wait.
    Then the gather has 4 seconds beside the carrier, needs 5 of HBM, and the core waits for 1."""
    assert schedule.step() == {"compute": 3 * 2.5 + 4, "hbm": 0, "ici": 1.5, "wait": 1}


def test_the_compilers_cycles_by_runs(schedule: Schedule) -> None:
    assert schedule.cycles == 3 * 300 + 500


def test_cycles_that_the_compiler_does_not_know_count_nothing() -> None:
    unknown = PROGRAM.replace('"estimated_cycles":"500"', f'"estimated_cycles":"{2**63 - 1}"')
    found = Schedule(Program(unknown), CHIP, kernel_flops)
    assert found.cycles == 3 * 300 and found.operations["carrier"].cycles is None


def test_transfers_go_in_the_order_of_their_starts() -> None:
    clock = Clock()
    clock.start("first", Seconds(hbm=2))
    clock.start("second", Seconds(hbm=1, ici=4))
    clock.work(Seconds(compute=1, hbm=0.5))  # leaves half a second of HBM and one of the links
    clock.wait("first")  # 1.5 of HBM are left
    assert clock.spent == {"compute": 1, "hbm": 0, "ici": 0, "wait": 1.5}
    clock.wait("nothing of that name")
    clock.finish()  # the links have had 2.5 of 4 seconds
    assert clock.spent["wait"] == 3
