"""Compile the attention kernels alone for each kind of chip, and print what fits.

python experimental/tpu_report/attention.py    # 2 minutes; needs `make libtpu`
"""

from __future__ import annotations

import os
import sys
import time
from functools import partial
from typing import NamedTuple

from torchprime.torch_xla_models.compile.library import find_library

LIBRARY = find_library()
sys.path[:0] = LIBRARY.python_path
# Read when jax is imported. Without them libtpu looks for this host's TPU, and for its lock.
os.environ.update(
    TPU_LIBRARY_PATH=str(LIBRARY.path),
    JAX_PLATFORMS="cpu",
    TPU_SKIP_MDS_QUERY="1",
    ALLOW_MULTIPLE_LIBTPU_LOAD="1",
    TPU_ACCELERATOR_TYPE="v6e-1",
    TPU_WORKER_HOSTNAMES="localhost",
)

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from jax._src import tpu_custom_call  # noqa: E402
from jax.experimental import topologies  # noqa: E402

from torchprime.attention_kernels.backward_kernel import backward  # noqa: E402
from torchprime.attention_kernels.blocks import blocks_for  # noqa: E402
from torchprime.attention_kernels.forward_kernel import forward  # noqa: E402
from torchprime.attention_kernels.kernel_parts import (  # noqa: E402
    Inputs,
    KernelOptions,
    head_shape,
)
from torchprime.torch_xla_models.compile.worker import KERNEL_IR_VERSION  # noqa: E402

CHIPS = {"v6e": "v6e:2x2", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1"}
ROWS = 2


class Shape(NamedTuple):
    """Attention of one model on one length."""

    heads: int
    kv_heads: int
    length: int
    head_dim: int
    dtype: type = jnp.bfloat16
    window: int | None = None
    softcap: float | None = None


SHAPES = [
    Shape(32, 8, 1024, 128),
    Shape(32, 8, 8192, 128),
    Shape(32, 8, 32768, 128),
    Shape(32, 8, 8192, 128, dtype=jnp.float32),
    Shape(14, 2, 2048, 64),
    Shape(16, 8, 4096, 256, window=1024),
    # Gemma 2 9B, whose layers take turns, and 27B.
    Shape(16, 8, 8192, 256, window=4096, softcap=50.0),
    Shape(16, 8, 8192, 256, softcap=50.0),
    Shape(32, 16, 8192, 128, softcap=50.0),
]


def compiled(shape: Shape, device: object) -> list[float | str]:
    """Return the seconds that the forward and the backward take to compile, or the compiler's
    message."""
    here = jax.sharding.SingleDeviceSharding(device)

    def array(*sizes: int, dtype: type = shape.dtype) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((ROWS, *sizes), dtype, sharding=here)

    blocks = blocks_for(shape.length, shape.head_dim, jnp.dtype(shape.dtype).itemsize)
    q = array(shape.heads, shape.length, shape.head_dim)
    k = array(shape.kv_heads, shape.length, shape.head_dim)
    segments = array(2, shape.length, dtype=jnp.int32)
    log_sum_exp = array(shape.heads, shape.length, dtype=jnp.float32)
    v, out = (
        array(*head_shape(ROWS, n, shape.length, shape.head_dim)[1:])
        for n in (shape.kv_heads, shape.heads)
    )
    given = Inputs(q, k, v, segments)
    options = KernelOptions(blocks, shape.window, shape.softcap)
    found: list[float | str] = []
    for kernel, arrays in (
        (forward, (given,)),
        (backward, (given, out, log_sum_exp, out)),
    ):
        start = time.monotonic()
        call = partial(kernel, options=options)
        try:
            jax.jit(call).lower(*arrays).compile()
            found.append(time.monotonic() - start)
        except jax.errors.JaxRuntimeError as error:
            found.append(str(error).splitlines()[0])
    return found


def main() -> int:
    """Print a line for each chip and shape; return 1 if one does not compile."""
    tpu_custom_call.get_ir_version = lambda ctx: KERNEL_IR_VERSION
    failed = False
    for chip, name in CHIPS.items():
        device = topologies.get_topology_desc(platform="tpu", topology_name=name).devices[0]
        for shape in SHAPES:
            results = compiled(shape, device)
            failed |= any(isinstance(each, str) for each in results)
            shown = [each if isinstance(each, str) else f"{each:.1f} s" for each in results]
            print(f"{chip} {tuple(shape)}: forward {shown[0]}, backward {shown[1]}", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
