"""The attention core on a TPU: the splash kernels with the core's two methods.

Scores [S, S] are never stored, and blocks outside the causal mask or the window are not computed.
The forward's result and log-sum-exp are kept for the backward, which computes the scores once more
and nothing else again.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch_xla.distributed.spmd as xs
from torch import Tensor, nn
from torch_xla.core.xla_builder import call_jax

from torchprime.attention_kernels.blocks import blocks_for
from torchprime.attention_kernels.kernel_parts import Inputs, KernelOptions, in_rows
from torchprime.attention_kernels.segments import with_first_positions
from torchprime.torch_xla_models.mesh import axis_sizes
from torchprime.torch_xla_models.splash import calls

HEAD_AXIS = "tensor"


class _Attend(torch.autograd.Function):
    """Attention whose forward was computed by our kernel, for the backward by the other."""

    @staticmethod
    def forward(ctx, setup: calls.Setup, out: Tensor, log_sum_exp: Tensor, *given: Tensor):  # type: ignore[override]
        ctx.setup = setup
        ctx.save_for_backward(out, log_sum_exp, *given)
        return out.clone()

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        out, log_sum_exp, *given = ctx.saved_tensors
        arguments = (Inputs(*given), out, log_sum_exp, grad.contiguous(), ctx.setup)
        gradients = call_jax(calls.gradients, arguments, {}, "splash_backward")
        return None, None, None, *gradients, None


class _AttendByJax(torch.autograd.Function):
    """Attention by jax's kernels, whose backward computes the forward again."""

    @staticmethod
    def forward(ctx, setup: calls.Setup, *given: Tensor):  # type: ignore[override]
        ctx.setup = setup
        ctx.save_for_backward(*given)
        return call_jax(calls.attend_by_jax, (Inputs(*given), setup), {}, "jax_splash_forward")

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        arguments = (Inputs(*ctx.saved_tensors), grad.contiguous(), ctx.setup)
        found = call_jax(calls.gradients_by_jax, arguments, {}, "jax_splash_backward")
        return None, *found, None


class Scores(NamedTuple):
    """The definition of a layer's scores.

    Attributes:
        head_dim: numbers of a head.
        window: positions that a query sees, its own among them; None for all.
        softcap: a score x becomes softcap * tanh(x / softcap); None: it stays as it is.
    """

    head_dim: int
    window: int | None = None
    softcap: float | None = None


class SplashAttention(nn.Module):
    """Causal attention within segments, by kernels.

    Args:
        batch_axes: mesh axes over which the batch is cut.
        by_jax: by jax's kernels instead of ours.
        interpret: run the kernels by the interpreter, which needs no TPU.
    """

    def __init__(
        self,
        scores: Scores,
        mesh: xs.Mesh,
        batch_axes: tuple[str, ...],
        *,
        by_jax: bool = False,
        interpret: bool = False,
    ) -> None:
        super().__init__()
        self.scores, self.head_dim, self.scale = scores, scores.head_dim, scores.head_dim**-0.5
        self.head_shards = axis_sizes(mesh)[HEAD_AXIS]
        self.mesh, self.batch_axes = str(mesh), batch_axes
        self.by_jax, self.interpret = by_jax, interpret
        # Named, so that remat can keep both results of the forward (remat.py).
        if not by_jax:
            self.out, self.log_sum_exp = nn.Identity(), nn.Identity()

    def prepare(self, segment_ids: Tensor) -> Tensor:
        """Return int32 [B, 2, S] for segment_ids [B, S]: the ids, and for each position the first
        one with its id."""
        return with_first_positions(segment_ids)

    def setup(self, length: int, itemsize: int) -> calls.Setup:
        """Return the kernels' settings for a sequence of this length.

        Args:
            itemsize: bytes of one value of queries, keys and values.
        """
        return calls.Setup(
            mesh=self.mesh,
            batch_axes=self.batch_axes,
            head_axis=HEAD_AXIS,
            kernel=KernelOptions(
                blocks_for(length, self.head_dim, itemsize),
                self.scores.window,
                self.scores.softcap,
                interpret=self.interpret,
            ),
        )

    def forward(self, q: Tensor, k: Tensor, v: Tensor, prepared: Tensor) -> Tensor:
        """Return [B, H, S, h] for q [B, H, S, h] and k, v [B, K, S, h]."""
        repeats = calls.kv_repeats(q.shape[1], k.shape[1], self.head_shards)
        if repeats > 1:
            k, v = (t.repeat_interleave(repeats, dim=1) for t in (k, v))
        q, k, v = ((q * self.scale).contiguous(), k.contiguous(), v.contiguous())
        setup = self.setup(q.shape[2], q.element_size())
        if self.by_jax:
            return _AttendByJax.apply(setup, q, k, v, prepared)  # type: ignore[no-any-return]
        rows = in_rows(self.head_dim)
        if rows:
            v = v.transpose(1, 2).flatten(2)
        given = Inputs(q.detach(), k.detach(), v.detach(), prepared)
        out, log_sum_exp = call_jax(calls.attend, (given, setup), {}, "splash_forward")
        out, log_sum_exp = self.out(out), self.log_sum_exp(log_sum_exp)
        mixed = _Attend.apply(setup, out, log_sum_exp, q, k, v, prepared)
        return mixed.unflatten(2, (-1, self.head_dim)).transpose(1, 2) if rows else mixed  # type: ignore
