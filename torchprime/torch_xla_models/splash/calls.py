"""The attention kernels as functions of whole arrays on a mesh, for torch_xla to call.

Each device works on its shard of the batch and of the heads; no kernel communicates.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel as kernels,
)
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_mask as masks,
)
from jax.experimental.shard_map import shard_map
from jax.sharding import PartitionSpec
from torch_xla.distributed.spmd import Mesh

from torchprime.attention_kernels.backward_kernel import backward
from torchprime.attention_kernels.blocks import largest_divisor
from torchprime.attention_kernels.forward_kernel import forward
from torchprime.attention_kernels.kernel_parts import Inputs, KernelOptions, in_rows


@dataclass(frozen=True)
class Setup:
    """Settings of a layer's attention on a mesh.

    Attributes:
        mesh: the mesh as torch_xla writes it.
        batch_axes: mesh axes over which the batch is cut.
        head_axis: mesh axis over which heads are cut.
        kernel: settings of the kernels.
    """

    mesh: str
    batch_axes: tuple[str, ...]
    head_axis: str
    kernel: KernelOptions


class Specs(NamedTuple):
    """Cuts of arrays over the mesh: [B, heads, S, h], those that `in_rows` describes, [B, heads, S]
    and [B, 2, S]."""

    wide: PartitionSpec
    mixed: PartitionSpec
    flat: PartitionSpec
    segments: PartitionSpec

    @property
    def given(self) -> Inputs:
        return Inputs(self.wide, self.wide, self.mixed, self.segments)


def attend(given: Inputs, setup: Setup) -> tuple[jax.Array, jax.Array]:
    """Return the result, arranged as `in_rows` says, and the log-sum-exp of each query's scores,
    [B, H, S] in fp32."""
    specs = _specs(setup, in_rows(given.q.shape[-1]))
    kernel = partial(forward, options=setup.kernel)
    return _on_mesh(kernel, setup, (specs.given,), (specs.mixed, specs.flat))(given)


def gradients(
    given: Inputs, out: jax.Array, log_sum_exp: jax.Array, grad: jax.Array, setup: Setup
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return the gradients of q, k and v from what `attend` returned and its gradient."""
    specs = _specs(setup, in_rows(given.q.shape[-1]))
    kernel = partial(backward, options=setup.kernel)
    ins = (specs.given, specs.mixed, specs.flat, specs.mixed)
    outs = specs.given[:3]
    return _on_mesh(kernel, setup, ins, outs)(given, out, log_sum_exp, grad)


def attend_by_jax(given: Inputs, setup: Setup) -> jax.Array:
    """Return the result [B, H, S, h] by jax's splash kernel."""
    specs = _specs(setup)
    rows = jax.vmap(partial(_row_by_jax, options=setup.kernel))
    return _on_mesh(rows, setup, (specs.given,), specs.wide)(given)


def gradients_by_jax(
    given: Inputs, grad: jax.Array, setup: Setup
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return the gradients of q, k and v by jax's backward, which computes the forward again."""

    def row(given: Inputs, grad: jax.Array) -> Any:
        def result(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            return _row_by_jax(Inputs(q, k, v, given.segments), setup.kernel)

        _, pull = jax.vjp(result, *given[:3])
        return pull(grad)

    specs = _specs(setup)
    return _on_mesh(jax.vmap(row), setup, (specs.given, specs.wide), (specs.wide,) * 3)(given, grad)


def _specs(setup: Setup, rows: bool = False) -> Specs:
    batch, heads = setup.batch_axes, setup.head_axis
    wide = PartitionSpec(batch, heads, None, None)
    return Specs(
        wide,
        PartitionSpec(batch, None, heads) if rows else wide,
        PartitionSpec(batch, heads, None),
        PartitionSpec(batch, None, None),
    )


def _on_mesh(kernel: Callable[..., Any], setup: Setup, ins: Any, outs: Any) -> Callable[..., Any]:
    """Run a kernel on each device's shard of the batch and the heads."""
    mesh = Mesh.from_str(setup.mesh).get_jax_mesh()  # pyright: ignore
    return shard_map(kernel, mesh=mesh, in_specs=ins, out_specs=outs, check_rep=False)


def _row_by_jax(given: Inputs, options: KernelOptions) -> jax.Array:
    ids = given.segments[0]
    kernel = _kernel_of_jax(given.q, options)
    return kernel(*given[:3], segment_ids=kernels.SegmentIds(ids, ids))


def _kernel_of_jax(q: jax.Array, options: KernelOptions) -> Any:
    """Return jax's kernel for queries [H, S, h]."""
    heads, length, _ = q.shape
    mask: Any = masks.CausalMask((length, length))
    if options.window is not None:
        # jax's window counts positions back from the query; ours counts the query too.
        back = options.window - 1
        mask &= masks.LocalMask((length, length), window_size=(back, back), offset=0)
    size = options.blocks.queries
    product = largest_divisor(size, options.blocks.keys)
    sizes = kernels.BlockSizes(
        block_q=size,
        block_kv=size,
        block_kv_compute=product,
        block_q_dkv=size,
        block_kv_dkv=size,
        block_kv_dkv_compute=product,
        use_fused_bwd_kernel=True,
    )
    return kernels.make_splash_mha(
        mask=masks.MultiHeadMask([mask] * heads),
        head_shards=1,
        q_seq_shards=1,
        block_sizes=sizes,
        attn_logits_soft_cap=options.softcap,
        interpret=options.interpret,
    )


def kv_repeats(heads: int, kv_heads: int, shards: int) -> int:
    """Return how often each kv head must be repeated to be cut into shards along with its queries:
    the smallest number that divides the group.

    Args:
        shards: parts into which heads are cut; divides `heads`.

    Examples:
        >>> kv_repeats(32, 8, 4), kv_repeats(32, 2, 4), kv_repeats(12, 3, 2)
        (1, 2, 2)
    """
    group = heads // kv_heads
    return next(r for r in range(1, group + 1) if group % r == 0 and kv_heads * r % shards == 0)
