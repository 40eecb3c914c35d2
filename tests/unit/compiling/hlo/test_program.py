"""Programs are read right: those XLA makes here, and lines as the TPU's compiler writes them."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from torchprime.compiling.hlo.program import Program


def compiled(function, *shapes) -> Program:
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    cpu = jax.local_devices(backend="cpu")[0]
    with jax.default_device(cpu):
        text = jax.jit(function).lower(*arguments).compile().as_text()
    assert text is not None
    return Program(text)


def test_a_loop_counts_as_often_as_it_runs() -> None:
    def layers(x, weights):
        def outer(x, w):
            inner = jax.lax.fori_loop(0, 3, lambda _, y: jnp.tanh(y @ w), x)
            return inner, ()

        return jax.lax.scan(outer, x, weights)[0] @ weights[0]

    program = compiled(layers, (8, 64), (5, 64, 64))
    assert sorted(program.loops) in ([3, 5], [5])  # XLA may unroll the inner one
    assert program.product_flops() == (5 * 3 + 1) * 2 * 8 * 64 * 64


def test_a_batched_product() -> None:
    program = compiled(lambda a, b: jnp.einsum("bij,bjk->bik", a, b), (4, 16, 32), (4, 32, 8))
    assert program.product_flops() == 2 * 4 * 16 * 32 * 8


# ruff: noqa: E501
TPU = """HloModule step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %add.1 = f32[] add(%a, %b)
}

%started (p0: bf16[64,32]) -> (bf16[64,32], bf16[256,32]) {
  %p0 = bf16[64,32]{1,0:T(8,128)(2,1)} parameter(0)
  %all-gather.1 = bf16[256,32]{1,0:T(8,128)(2,1)S(1)} all-gather(%p0), channel_id=7, replica_groups={{0,1,2,3}}, dimensions={0}
  ROOT %custom-call.1 = (bf16[64,32]{1,0}, bf16[256,32]{1,0}) custom-call(%p0, %all-gather.1), custom_call_target="AsyncCollectiveStart"
}

%ended (p1: bf16[64,32]) -> bf16[256,32] {
  %p1 = bf16[64,32]{1,0} parameter(0)
  ROOT %all-gather.2 = bf16[256,32]{1,0:T(8,128)(2,1)} all-gather(%p1), channel_id=7, replica_groups={{0,1,2,3}}, dimensions={0}
}

%all-reduce-scatter.3 (p2: bf16[256,32]) -> bf16[64,32] {
  %p2 = bf16[256,32]{1,0} parameter(0)
  %all-reduce.9 = bf16[256,32]{1,0} all-reduce(%p2), channel_id=9, replica_groups=[1,4]<=[4], to_apply=%add
  ROOT %dynamic-slice.1 = bf16[64,32]{1,0} dynamic-slice(%all-reduce.9, %p2)
}

%body (arg: (u32[], u32[], bf16[6,64,32])) -> (u32[], u32[], bf16[6,64,32]) {
  %arg = (u32[]{:T(128)}, u32[]{:T(128)}, bf16[6,64,32]{2,1,0}) parameter(0)
  %low = u32[]{:T(128)} get-tuple-element(%arg), index=0
  %high = u32[]{:T(128)} get-tuple-element(%arg), index=1
  %two = u32[]{:T(128)} constant(2)
  %next = u32[]{:T(128)} add(%low, %two)
  %stack = bf16[6,64,32]{2,1,0} get-tuple-element(%arg), index=2
  %slice.1 = bf16[1,64,32]{2,1,0} dynamic-slice(%stack, %low, %high, %high), dynamic_slice_sizes={1,64,32}
  %one = bf16[64,32]{1,0} bitcast(%slice.1)
  %fusion.1 = (bf16[64,32]{1,0}, bf16[256,32]{1,0}) fusion(%one), kind=kLoop, calls=%started
  %fusion.2 = bf16[256,32]{1,0} fusion(%one), kind=kLoop, calls=%ended
  %all-reduce-scatter = bf16[64,32]{1,0} fusion(%fusion.2), kind=kCustom, calls=%all-reduce-scatter.3
  %splash.4 = bf16[64,32]{1,0} custom-call(%one), custom_call_target="tpu_custom_call"
  ROOT %out = (u32[], u32[], bf16[6,64,32]) tuple(%next, %high, %stack)
}

%condition (arg.2: (u32[], u32[], bf16[6,64,32])) -> pred[] {
  %arg.2 = (u32[]{:T(128)}, u32[]{:T(128)}, bf16[6,64,32]{2,1,0}) parameter(0)
  %zero = u32[]{:T(128)} constant(0)
  %six = u32[]{:T(128)} constant(6)
  %hi = u32[]{:T(128)} get-tuple-element(%arg.2), index=1
  %is-zero = pred[] compare(%hi, %zero), direction=EQ
  %lo = u32[]{:T(128)} get-tuple-element(%arg.2), index=0
  %below = pred[] compare(%lo, %six), direction=LT
  ROOT %and = pred[] and(%is-zero, %below)
}

ENTRY %main (x: bf16[6,64,32], y: bf16[4,96,24], z: bf16[4,24,16]) -> bf16[4,96,16] {
  %x = bf16[6,64,32]{2,1,0} parameter(0)
  %y = bf16[4,96,24]{2,1,0} parameter(1)
  %z = bf16[4,24,16]{2,1,0} parameter(2)
  %start = (u32[], u32[], bf16[6,64,32]) tuple(%x, %x, %x)
  %while.1 = (u32[], u32[], bf16[6,64,32]) while(%start), condition=%condition, body=%body
  %permuted = (bf16[64,32]{1,0}, bf16[64,32]{1,0:S(1)}, u32[], u32[]) collective-permute-start(%x), channel_id=11, source_target_pairs={{0,1},{1,0}}
  ROOT %product = bf16[4,96,16]{2,1,0} convolution(%y, %z), window={size=4 stride=3 pad=0_0 lhs_dilate=4}, dim_labels=0bf_0io->0bf
}
"""


def test_loops_with_a_split_counter_and_another_step() -> None:
    assert Program(TPU).loops == [3]  # to 6 by 2


def test_an_asynchronous_collective_is_one() -> None:
    found = {each.kind: each for each in Program(TPU).collectives()}
    assert len(Program(TPU).collectives()) == 3
    gather, scatter = found["all-gather"], found["reduce-scatter"]
    assert (gather.runs, gather.payload, gather.dtype) == (3, 256 * 32 * 2, "bf16")
    assert (scatter.runs, scatter.payload) == (3, 256 * 32 * 2)
    permute = found["collective-permute"]
    assert (permute.runs, permute.payload) == (1, 64 * 32 * 2)


def test_kernels_by_runs() -> None:
    assert dict(Program(TPU).kernels()) == {"splash": 3}


def test_a_batched_product_as_the_tpu_writes_it() -> None:
    """Batch dims are window dims with gaps, of which only the diagonal meets: 4 pairs, not 16."""
    assert Program(TPU).product_flops() == 2 * 4 * 96 * 24 * 16
