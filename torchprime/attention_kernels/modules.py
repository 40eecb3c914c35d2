"""A kernel as a module of StableHLO, for programs that another library lowers.

For a TPU the module has the compiled kernel; for a CPU it has the interpreter's operations, which
compute the same. No device is needed for either.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax

from torchprime.attention_kernels.backward_kernel import backward
from torchprime.attention_kernels.forward_kernel import forward
from torchprime.attention_kernels.kernel_parts import Inputs, KernelOptions

TPU, CPU = "tpu", "cpu"
FORWARD, BACKWARD = "splash_forward", "splash_backward"


def kernel_function(kind: str, options: KernelOptions) -> Callable[..., Sequence[jax.Array]]:
    """Return a kernel as a function of arrays one after another.

    Args:
        kind: FORWARD: q, k, v, segments -> result, log-sum-exp. BACKWARD: the same, result,
            log-sum-exp, gradient of the result -> gradients of q, k and v.
    """
    if kind == FORWARD:
        return lambda *given: forward(Inputs(*given), options)
    return lambda *given: backward(Inputs(*given[:4]), given[4], given[5], given[6], options)


def kernel_module(
    kind: str, options: KernelOptions, given: Sequence[tuple[Sequence[int], Any]], platform: str
) -> str:
    """Return a module whose main function is a kernel, as text with the names of its operations.

    Args:
        kind: as `kernel_function` takes it.
        given: shape and type of each array.
        platform: TPU or CPU.
    """
    function = kernel_function(kind, replace(options, interpret=platform != TPU))
    arrays = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in given]
    return (
        jax.jit(function)
        .trace(*arrays)
        .lower(lowering_platforms=(platform,))
        .as_text(debug_info=True)
    )
