"""A comparison of the attention kernel with the reference core on the run's own chips.

Kernels are compiled for a generation of chips, and a chip's compiler may be wrong. So before a run
trains with one, its result and its gradients are computed on a short block of several segments.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from torchprime.errors import RuntimeSetupError
from torchprime.models.attention import ReferenceAttention
from torchprime.sharding import Spec
from torchprime.torch_xla_models.device_tensors import DeviceTensors
from torchprime.torch_xla_models.mesh import axis_sizes
from torchprime.torch_xla_models.splash.attention import HEAD_AXIS, SplashAttention

LENGTH = 512
# Of a row: three segments, the second over the middle, and padding.
SEGMENTS = (150, 230, 100)
# Norm of the difference over the norm of the reference. bf16 rounds each value by up to 0.4%.
MOST = 0.02


class Heads(NamedTuple):
    """Heads of a layer: of queries, and of keys and values."""

    queries: int
    keys: int


def check_kernel(
    core: SplashAttention, name: str, heads: Heads, dtype: torch.dtype, tensors: DeviceTensors
) -> str:
    """Compare a core with the reference on this mesh; the inputs are random.

    Args:
        name: the kernel's name in the config.
        dtype: of queries, keys and values.

    Returns:
        A line that reports the result.

    Raises:
        RuntimeSetupError: they differ by more than rounding.
    """
    sizes = axis_sizes(tensors.mesh)
    rows = math.prod(sizes[axis] for axis in core.batch_axes)
    generator = torch.Generator().manual_seed(0)
    spec: Spec = (core.batch_axes, (HEAD_AXIS,), (), ())
    q, k, v, grad = (
        tensors.send(
            torch.randn(rows, n, LENGTH, core.head_dim, generator=generator).to(dtype), spec
        )
        for n in (heads.queries, heads.keys, heads.keys, heads.queries)
    )
    segments = tensors.send(_segments(rows), (core.batch_axes, ()))
    found = _results(core, (q, k, v), grad, segments)
    reference = ReferenceAttention(*core.scores)
    wide = [t.float() for t in (q, k, v, grad)]
    expected = _results(reference, wide[:3], wide[3], segments)
    gaps = [_gap(ours, theirs) for ours, theirs in zip(found, expected, strict=True)]
    errors = dict(
        zip(("its result", "dq", "dk", "dv"), torch.stack(gaps).cpu().tolist(), strict=True)
    )
    # NaN is wrong too, and compares as nothing.
    what, worst = max(errors.items(), key=lambda item: math.inf if math.isnan(item[1]) else item[1])
    if not worst <= MOST:
        others = "splash_jax or reference" if name == "splash" else "reference"
        raise RuntimeSetupError(
            f"model.attention_kernel={name}: on this device {what} differs from the reference core "
            f"by {worst:.1%}, expected at most {MOST:.0%}. Use {others} instead, and please report "
            "this with the chip's name."
        )
    return (
        f"attention    {name} agrees with the reference core here: result and gradients differ by "
        f"{worst:.2%} at most"
    )


def _segments(rows: int) -> Tensor:
    lengths = torch.tensor([*SEGMENTS, LENGTH - sum(SEGMENTS)])
    numbers = torch.tensor([*range(1, len(SEGMENTS) + 1), 0], dtype=torch.int32)
    return torch.repeat_interleave(numbers, lengths).expand(rows, -1).contiguous()


def _results(core: nn.Module, given: Sequence[Tensor], grad: Tensor, ids: Tensor) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in given]
    out = core(*leaves, core.prepare(ids))  # pyright: ignore[reportCallIssue]
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def _gap(ours: Tensor, theirs: Tensor) -> Tensor:
    return (ours.float() - theirs).norm() / theirs.norm()
