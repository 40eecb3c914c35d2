"""Bytes in HBM, counted by hand. An array A is bf16[64,64]: 8,192 bytes."""

from __future__ import annotations

import pytest

from torchprime.compiling.hlo.program import Program

A = 64 * 64 * 2

# ruff: noqa: E501
PROGRAM = """HloModule slices, is_scheduled=true

%cut (s: bf16[8,64,64], i: s32[]) -> bf16[64,64] {
  %s = bf16[8,64,64]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %one = bf16[1,64,64]{2,1,0} dynamic-slice(%s, %i), dynamic_slice_sizes={1,64,64}
  ROOT %flat = bf16[64,64]{1,0} bitcast(%one)
}

%other_tiling (o: bf16[8,64,64]) -> bf16[8,64,64] {
  %o = bf16[8,64,64]{2,1,0} parameter(0)
  ROOT %tiled = bf16[8,64,64]{1,2,0} copy(%o)
}

%as_it_is (v: bf16[64,64]) -> bf16[64,64] {
  %v = bf16[64,64]{1,0} parameter(0)
  ROOT %same = bf16[64,64]{1,0} bitcast(%v)
}

%put (t: bf16[8,64,64], n: bf16[64,64], j: s32[]) -> bf16[8,64,64] {
  %t = bf16[8,64,64]{2,1,0} parameter(0)
  %n = bf16[64,64]{1,0} parameter(1)
  %j = s32[] parameter(2)
  %row = bf16[1,64,64]{2,1,0} bitcast(%n)
  ROOT %updated = bf16[8,64,64]{2,1,0} dynamic-update-slice(%t, %row, %j)
}

%product (x: bf16[64,64], w: bf16[8,64,64], k: s32[]) -> bf16[64,64] {
  %x = bf16[64,64]{1,0} parameter(0)
  %w = bf16[8,64,64]{2,1,0} parameter(1)
  %k = s32[]{:S(6)} parameter(2)
  %tiling = bf16[8,64,64]{1,2,0} fusion(%w), kind=kLoop, calls=%other_tiling
  %weight = bf16[64,64]{1,0} fusion(%tiling, %k), kind=kLoop, calls=%cut
  %same_x = bf16[64,64]{1,0} fusion(%x), kind=kLoop, calls=%as_it_is
  ROOT %dot = bf16[64,64]{1,0} dot(%same_x, %weight), lhs_contracting_dims={1}, rhs_contracting_dims={1}
}

%store (y: bf16[64,64], u: bf16[8,64,64], l: s32[]) -> (bf16[64,64], bf16[8,64,64]) {
  %y = bf16[64,64]{1,0} parameter(0)
  %u = bf16[8,64,64]{2,1,0} parameter(1)
  %l = s32[]{:S(6)} parameter(2)
  %twice = bf16[64,64]{1,0} add(%y, %y)
  %all = bf16[8,64,64]{2,1,0} fusion(%u, %twice, %l), kind=kLoop, calls=%put
  ROOT %both = (bf16[64,64]{1,0}, bf16[8,64,64]{2,1,0}) tuple(%twice, %all)
}

%starts (g: bf16[64,64]) -> (bf16[64,64], bf16[4,64,64], u32[]) {
  %g = bf16[64,64]{1,0} parameter(0)
  %all-gather.1 = bf16[4,64,64]{2,1,0} all-gather(%g), channel_id=1, replica_groups=[1,4]<=[4], dimensions={0}, backend_config={"async_collective_fusion_config":{}}
  ROOT %begun = (bf16[64,64]{1,0}, bf16[4,64,64]{2,1,0}, u32[]{:S(2)}) custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}

%carries (h: bf16[64,64], b: bf16[4,64,64], f: u32[], d: bf16[64,64]) -> (bf16[64,64], bf16[64,64], bf16[4,64,64], bf16[4,64,64], u32[]) {
  %h = bf16[64,64]{1,0} parameter(0)
  %b = bf16[4,64,64]{2,1,0} parameter(1)
  %f = u32[]{:S(2)} parameter(2)
  %d = bf16[64,64]{1,0} parameter(3)
  %work = bf16[64,64]{1,0} multiply(%d, %d)
  %all-gather.2 = bf16[4,64,64]{2,1,0} all-gather(%h), channel_id=1, replica_groups=[1,4]<=[4], dimensions={0}, backend_config={"async_collective_fusion_config":{}}
  ROOT %carried = (bf16[64,64]{1,0}, bf16[64,64]{1,0}, bf16[4,64,64]{2,1,0}, bf16[4,64,64]{2,1,0}, u32[]{:S(2)}) tuple(%work, %h, %b, %all-gather.2, %f)
}

%ends (m: bf16[64,64], e: bf16[4,64,64], r: u32[]) -> bf16[4,64,64] {
  %m = bf16[64,64]{1,0} parameter(0)
  %e = bf16[4,64,64]{2,1,0} parameter(1)
  %r = u32[]{:S(2)} parameter(2)
  %all-gather.3 = bf16[4,64,64]{2,1,0} all-gather(%m), channel_id=1, replica_groups=[1,4]<=[4], dimensions={0}, backend_config={"async_collective_fusion_config":{}}
  ROOT %done = bf16[4,64,64]{2,1,0} custom-call(%m, %e, %all-gather.3, %r), custom_call_target="AsyncCollectiveDone"
}

%part (whole: bf16[8,64,64]) -> bf16[2,64,64] {
  %whole = bf16[8,64,64]{2,1,0} parameter(0)
  ROOT %two = bf16[2,64,64]{2,1,0:S(1)} slice(%whole), slice={[0:2], [0:64], [0:64]}
}

ENTRY %main (a: bf16[64,64], stack: bf16[8,64,64], state: bf16[8,64,64], table: bf16[512,64], ids: s32[16,1]) -> bf16[64,64] {
  %a = bf16[64,64]{1,0} parameter(0)
  %stack = bf16[8,64,64]{2,1,0} parameter(1)
  %state = bf16[8,64,64]{2,1,0} parameter(2)
  %table = bf16[512,64]{1,0} parameter(3)
  %ids = s32[16,1]{1,0} parameter(4)
  %index = s32[]{:S(6)} constant(3)
  %near = bf16[64,64]{1,0:S(1)} copy(%a)
  %fused = bf16[64,64]{1,0} fusion(%a, %stack, %index), kind=kOutput, calls=%product
  %stored = (bf16[64,64]{1,0:S(1)}, bf16[8,64,64]{2,1,0}) fusion(%near, %state, %index), kind=kLoop, calls=%store
  %updated.2 = bf16[8,64,64]{2,1,0} dynamic-update-slice(%state, %near, %index)
  %rows = bf16[16,64]{1,0} gather(%table, %ids), slice_sizes={1,64}
  %sliced = ((bf16[8,64,64]{2,1,0}), bf16[2,64,64]{2,1,0:S(1)}, s32[]{:S(2)}) slice-start(%stack), slice={[0:2], [0:64], [0:64]}
  %slice-done = bf16[2,64,64]{2,1,0:S(1)} slice-done(%sliced)
  %sliced.2 = ((bf16[8,64,64]{2,1,0}), bf16[2,64,64]{2,1,0:S(1)}, s32[]{:S(2)}) async-start(%stack), calls=%part
  %slice-done.2 = bf16[2,64,64]{2,1,0:S(1)} async-done(%sliced.2)
  %copied = (bf16[64,64]{1,0}, bf16[64,64]{1,0:S(1)}, u32[]{:S(2)}) copy-start(%near)
  %copy-done = bf16[64,64]{1,0} copy-done(%copied)
  %offloaded = (bf16[64,64]{1,0:S(5)}, bf16[64,64]{1,0}, u32[]{:S(2)}) copy-start(%fused)
  %buffer = bf16[64,64]{1,0} custom-call(), custom_call_target="AllocateBuffer"
  %joined = bf16[64,64]{1,0} custom-call(%a, %fused), custom_call_target="ConcatBitcast"
  %begun.1 = (bf16[64,64]{1,0}, bf16[4,64,64]{2,1,0}, u32[]{:S(2)}) fusion(%a), kind=kCustom, calls=%starts
  %h.1 = bf16[64,64]{1,0} get-tuple-element(%begun.1), index=0
  %b.1 = bf16[4,64,64]{2,1,0} get-tuple-element(%begun.1), index=1
  %f.1 = u32[]{:S(2)} get-tuple-element(%begun.1), index=2
  %carrier = (bf16[64,64]{1,0}, bf16[64,64]{1,0}, bf16[4,64,64]{2,1,0}, bf16[4,64,64]{2,1,0}, u32[]{:S(2)}) fusion(%h.1, %b.1, %f.1, %fused), kind=kLoop, calls=%carries
  %h.2 = bf16[64,64]{1,0} get-tuple-element(%carrier), index=1
  %b.2 = bf16[4,64,64]{2,1,0} get-tuple-element(%carrier), index=3
  %f.2 = u32[]{:S(2)} get-tuple-element(%carrier), index=4
  %gathered = bf16[4,64,64]{2,1,0} fusion(%h.2, %b.2, %f.2), kind=kCustom, calls=%ends
  %permuted = (bf16[64,64]{1,0}, bf16[64,64]{1,0:S(1)}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%a), channel_id=2, source_target_pairs={{0,1},{1,0}}
  %permute-done = bf16[64,64]{1,0:S(1)} collective-permute-done(%permuted)
  %splash = bf16[64,64]{1,0} custom-call(%a, %near, %gathered), custom_call_target="tpu_custom_call"
  ROOT %sum = bf16[64,64]{1,0} add(%splash, %near)
}
"""

# Reads and writes by hand. `near` is on the core, `index` in another of its memories.
BY_HAND = {
    "near": (A, 0),
    # x whole, through a fusion that only names it anew; of the stack, behind a change of its
    # tiling, the slice; the result.
    "fused": (A + A, A),
    # y is on the core, and so is the first result; of the state only the update is written.
    "stored": (0, A),
    "updated.2": (0, A),
    # 16 of the table's rows, and the indices (4 bytes each); the result.
    "rows": (16 * 64 * 2 + 16 * 4, 16 * 64 * 2),
    # Asynchronous: once, at the start. What goes to the host is read here.
    "sliced": (2 * A, 0),
    "slice-done": (0, 0),
    "sliced.2": (2 * A, 0),  # as the compiler's own files have it
    "slice-done.2": (0, 0),
    "copied": (0, A),
    "copy-done": (0, 0),
    "offloaded": (A, 0),
    "buffer": (0, 0),
    "joined": (0, 0),
    # The gather's operand and result at its start; a fusion that carries it has its own alone.
    "begun.1": (A, 4 * A),
    "carrier": (A, A),
    "gathered": (0, 0),
    "permuted": (A, 0),
    "permute-done": (0, 0),
    # A kernel reads its operands once.
    "splash": (A + 4 * A, A),
    "sum": (A, A),
}


@pytest.fixture(scope="module")
def program() -> Program:
    return Program(PROGRAM)


@pytest.mark.parametrize("name", BY_HAND)
def test_each_operation(name: str, program: Program) -> None:
    assert program.traffic("main", program.computations["main"][name]) == BY_HAND[name]


def test_a_whole_program(program: Program) -> None:
    silent = {"a", "stack", "state", "table", "ids", "index"}
    names = {each.name for _, each in program.operations() if each.kind != "get-tuple-element"}
    assert names - silent == BY_HAND.keys()
    assert program.hbm_bytes() == sum(map(sum, BY_HAND.values()))
