"""The attention kernels as functions of whole arrays on a mesh, for torch_xla to call.

Each device works on its shard of the batch and of the heads; no kernel communicates.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

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

from torchprime.torch_xla_models.splash.backward_kernel import backward
from torchprime.torch_xla_models.splash.blocks import Blocks, largest_divisor
from torchprime.torch_xla_models.splash.forward_kernel import forward


@dataclass(frozen=True)
class Setup:
    """What the kernels of a model's layers share.

    Attributes:
        mesh: the mesh as torch_xla writes it.
        batch_axes: mesh axes over which the batch is cut.
        head_axis: mesh axis over which heads are cut.
        window: positions that a query sees, its own among them; None for all.
        interpret: run the kernels by the interpreter, on any device.
    """

    mesh: str
    batch_axes: tuple[str, ...]
    head_axis: str
    blocks: Blocks
    window: int | None = None
    interpret: bool = False


def attend(
    q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array, setup: Setup
) -> tuple[jax.Array, jax.Array]:
    """Return the result [B, H, S, h], and the log-sum-exp of each query's scores, [B, H, S] in
    fp32.

    Args:
        q: [B, H, S, h], scaled.
        k, v: [B, K, S, h].
        segments: [B, 2, S]: ids, and the first position of each position's segment.
    """
    row = partial(forward, blocks=setup.blocks, window=setup.window, interpret=setup.interpret)
    return _on_mesh(row, setup, "qqqs", "ql")(q, k, v, segments)  # type: ignore[no-any-return]


def gradients(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segments: jax.Array,
    out: jax.Array,
    log_sum_exp: jax.Array,
    grad: jax.Array,
    setup: Setup,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return the gradients of q, k and v from what `attend` returned and its gradient."""
    row = partial(backward, blocks=setup.blocks, window=setup.window, interpret=setup.interpret)
    call = _on_mesh(row, setup, "qqqsqlq", "qqq")
    return call(q, k, v, segments, out, log_sum_exp, grad)  # type: ignore[no-any-return]


def attend_by_jax(
    q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array, setup: Setup
) -> jax.Array:
    """Return the result [B, H, S, h] by jax's splash kernel, from what `attend` takes."""

    def row(q: Any, k: Any, v: Any, segments: Any) -> Any:
        return _kernel_of_jax(q, setup)(q, k, v, segment_ids=_ids(segments))

    return _on_mesh(row, setup, "qqqs", "q")(q, k, v, segments)  # type: ignore[no-any-return]


def gradients_by_jax(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segments: jax.Array,
    grad: jax.Array,
    setup: Setup,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return the gradients of q, k and v by jax's backward, which computes the forward again."""

    def row(q: Any, k: Any, v: Any, segments: Any, grad: Any) -> Any:
        kernel = _kernel_of_jax(q, setup)
        _, pull = jax.vjp(lambda q, k, v: kernel(q, k, v, segment_ids=_ids(segments)), q, k, v)
        return pull(grad)

    return _on_mesh(row, setup, "qqqsq", "qqq")(q, k, v, segments, grad)  # type: ignore[no-any-return]


def _on_mesh(row: Callable[..., Any], setup: Setup, given: str, returned: str) -> Any:
    """Map a function of one row over the batch, on each device's shard.

    Args:
        given, returned: a letter for each array: q for [B, heads, S, h], l for [B, heads, S], s for
            [B, 2, S].
    """
    batch, heads = setup.batch_axes, setup.head_axis
    specs = {
        "q": PartitionSpec(batch, heads, None, None),
        "l": PartitionSpec(batch, heads, None),
        "s": PartitionSpec(batch, None, None),
    }
    outs = tuple(specs[letter] for letter in returned)
    return shard_map(
        jax.vmap(row),
        mesh=Mesh.from_str(setup.mesh).get_jax_mesh(),  # pyright: ignore
        in_specs=tuple(specs[letter] for letter in given),
        out_specs=outs if len(outs) > 1 else outs[0],
        check_rep=False,
    )


def _ids(segments: jax.Array) -> Any:
    return kernels.SegmentIds(segments[0], segments[0])


def _kernel_of_jax(q: jax.Array, setup: Setup) -> Any:
    """Return jax's kernel for queries [H, S, h]."""
    heads, length, _ = q.shape
    mask: Any = masks.CausalMask((length, length))
    if setup.window is not None:
        # jax's window counts positions back from the query; ours counts the query too.
        back = setup.window - 1
        mask &= masks.LocalMask((length, length), window_size=(back, back), offset=0)
    size = setup.blocks.queries
    product = largest_divisor(size, setup.blocks.keys)
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
        interpret=setup.interpret,
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
