"""Cross-entropy of supervised tokens only, by Liger's fused kernel if it is installed.

Liger computes logits for some tokens at a time, like torchprime/losses/cross_entropy.py, but loss
and gradient of a row of them in one kernel. The definition of the loss is unchanged: a sum over
supervised tokens, each with its weight, and every token's share. Liger needs a factor per token for
the gradient; older versions do not have it and are not used.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from torchprime.errors import ConfigError
from torchprime.installed import installed_version
from torchprime.losses.chunks import Projection
from torchprime.losses.cross_entropy import IGNORED, LossSums, token_weights
from torchprime.losses.token_loss import CROSS_ENTROPY, TokenLoss
from torchprime.training.step import CrossEntropy

# The parameters of Liger's function that we use. A version without one of these is not used.
NEEDED = (
    *("token_grad_output", "compute_gradients", "weight_requires_grad", "accum_dtype"),
    *("label_smoothing", "lse_square_scale", "return_z_loss", "softcap"),
)


class LossRequest(NamedTuple):
    """The kernel that a config asks for, and what it has to compute."""

    kernel: str = "auto"  # or liger or chunked
    dft: bool = False  # the token loss is that of dynamic fine-tuning
    smoothed: bool = False  # with label smoothing


ANY_KERNEL = LossRequest()


class Liger(NamedTuple):
    """The result of the search for Liger."""

    forward: Callable[..., Any] | None  # fused_linear_cross_entropy_forward, if it can be used
    told: str  # its version, or the reason why it can't be used


def find_liger() -> Liger:
    """Look for Liger's function, and check that it takes a weight for each token."""
    version = installed_version("liger-kernel")
    if version is None:
        return Liger(None, "liger-kernel is not installed")
    try:
        module = import_module("liger_kernel.ops.fused_linear_cross_entropy")
        forward = module.fused_linear_cross_entropy_forward
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        return Liger(None, f"liger-kernel {version} cannot be loaded ({error})")
    missing = [name for name in NEEDED if name not in inspect.signature(forward).parameters]
    if missing:
        return Liger(
            None, f"liger-kernel {version} takes no weight per token (no {missing[0]}); 0.8.5 does"
        )
    return Liger(forward, f"liger-kernel {version}")


def choose_loss(request: LossRequest, device_type: str, liger: Liger) -> tuple[str, str]:
    """Resolve `auto` and refuse a kernel that is not available.

    Returns:
        `liger` or `chunked`, and the reason.
    """
    wanted = request.kernel
    if device_type != "cuda":
        obstacle = f"liger runs on CUDA only, and this run is on {device_type}"
    else:
        obstacle = "" if liger.forward else liger.told
    if wanted == "liger" and obstacle:
        raise ConfigError(
            f"task.loss_kernel=liger: {obstacle}. Use auto or chunked, or install it "
            "(pip install 'torchprime[gpu]')."
        )
    if wanted == "supervised":  # as ours always is on this backend
        wanted = "chunked"
    if wanted != "auto":
        return wanted, "as configured"
    if device_type != "cuda":
        return "chunked", f"auto on {device_type}"
    if request.dft and not obstacle:
        obstacle = "with task.loss.dft=true Liger does not tell the cross-entropy beside the loss"
    if obstacle:
        return "chunked", f"auto on CUDA: {obstacle}"
    return "liger", f"auto on CUDA: {liger.told}"


def loss_for_softcap(
    request: LossRequest, chosen: tuple[str, str], softcap: float | None
) -> tuple[str, str]:
    """Return the kernel and the reason for a model whose logits may have a soft-cap. Liger takes
    one, but the cross-entropy beside a smoothed loss follows from the mean logit, which is not that
    of the weight's mean row then.

    Args:
        chosen: what `choose_loss` returned.

    Raises:
        ConfigError: the config names Liger for such a loss.
    """
    if softcap is None or not request.smoothed or chosen[0] != "liger":
        return chosen
    obstacle = (
        "with task.loss.label_smoothing and a model that caps its logits "
        "(final_logit_softcapping), Liger does not tell the cross-entropy beside the loss"
    )
    if request.kernel == "liger":
        raise ConfigError(f"task.loss_kernel=liger: {obstacle}. Use auto or chunked.")
    return "chunked", f"auto on CUDA: {obstacle}"


class _FusedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_BSD: Tensor,
        w_VD: Tensor,
        softcap: float | None,
        t_BS: Tensor,
        weight_BS: Tensor,
        need_grad: bool,
        kind: TokenLoss,
        liger_forward: Callable[..., Any],
    ) -> tuple[Tensor, ...]:
        # A token without weight is one without a target: its logits are not computed.
        targets = torch.where(weight_BS != 0, t_BS, IGNORED).long()
        found = liger_forward(
            x_BSD.flatten(0, 1),
            w_VD,
            targets.flatten(),
            ignore_index=IGNORED,
            reduction="none",
            accum_dtype=torch.float32,  # of the weight's gradient, over chunks
            token_grad_output=weight_BS.flatten(),
            compute_gradients=need_grad,
            weight_requires_grad=ctx.needs_input_grad[1],
            label_smoothing=kind.label_smoothing,
            lse_square_scale=kind.z_loss,
            return_z_loss=kind.z_loss > 0,
            softcap=softcap,
        )
        # Loss per token first; at the end the gradients to input, weight and bias.
        each = found[0].view_as(weight_BS) * weight_BS
        if need_grad:
            grad_x, grad_w = found[-3], found[-2]  # None for a frozen weight
            grad_w = None if grad_w is None else grad_w.to(w_VD.dtype)
            ctx.save_for_backward(grad_x.view_as(x_BSD), grad_w)
        terms = [] if kind == CROSS_ENTROPY else _terms(kind, found, x_BSD, w_VD, t_BS, weight_BS)
        ctx.mark_non_differentiable(each, *terms)
        return each.sum(), each, *terms

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad: Tensor, *_: Tensor
    ) -> tuple[Tensor | None, ...]:
        grad_x, grad_w = ctx.saved_tensors
        of_weight = None if grad_w is None else grad * grad_w
        return grad * grad_x, of_weight, None, None, None, None, None, None


def _terms(
    kind: TokenLoss,
    found: Sequence[Any],
    x_BSD: Tensor,
    w_VD: Tensor,
    t_BS: Tensor,
    weight_BS: Tensor,
) -> list[Tensor]:
    """Return the sums named by `kind.terms`, from Liger's loss per token.

    The smoothed loss is larger than the cross-entropy by e * (the target's logit - the mean logit),
    and the mean logit is the product with the mean row of the output weight.
    """
    cross_entropy, parts = found[0].view_as(weight_BS), []
    if kind.z_loss:
        z_loss = found[1].float().view_as(weight_BS)
        cross_entropy, parts = cross_entropy - z_loss, [z_loss]
    if kind.label_smoothing:
        rows = w_VD[t_BS.clamp(min=0).long()] - w_VD.mean(dim=0, dtype=torch.float32).to(w_VD.dtype)
        above = (x_BSD * rows).sum(dim=-1, dtype=torch.float32)
        cross_entropy = cross_entropy - kind.label_smoothing * above
    parts = [cross_entropy, *parts]
    return [torch.where(weight_BS != 0, part * weight_BS, 0.0).sum() for part in parts]


def on_supervised_tokens(
    cross_entropy: CrossEntropy,
    hidden: Tensor,
    output: Projection,
    targets: Tensor,
    loss_weights: Tensor,
) -> LossSums:
    """Return the same loss with logits of supervised tokens only: in fine-tuning half of the slots
    carry no loss."""
    weights = token_weights(targets, loss_weights)

    def compute(hidden: Tensor, targets: Tensor, weights: Tensor) -> LossSums:
        return cross_entropy(hidden, output, targets, weights)

    return on_tokens(weights, (hidden, targets, weights), compute)


def on_tokens(
    weights: Tensor, given: Sequence[Tensor], compute: Callable[..., LossSums]
) -> LossSums:
    """Compute a loss of the tokens that have a weight, in a batch of one. Their number is known on
    the device only: the host waits for it.

    Args:
        weights: [B, S].
        given: tensors [B, S, ...], which `compute` gets as [1, T, ...].
    """
    chosen = weights.flatten().nonzero().flatten()
    if not len(chosen):
        chosen = chosen.new_zeros(1)  # of weight 0, so that backward has an input
    sums = compute(*(x.flatten(0, 1).index_select(0, chosen)[None] for x in given))
    each = torch.zeros_like(weights).flatten().index_copy(0, chosen, sums.each[0])
    return LossSums(sums.loss_sum, sums.weight_sum, each.view_as(weights), sums.terms)


def fused_cross_entropy(
    hidden: Tensor,
    output: Projection,
    targets: Tensor,
    loss_weights: Tensor,
    *,
    liger_forward: Callable[..., Any],
    kind: TokenLoss = CROSS_ENTROPY,
) -> LossSums:
    """Return `torchprime.losses.cross_entropy.chunked_cross_entropy`, computed by Liger's function,
    which makes its own chunks. It has every kind but DFT, and but label smoothing with a
    soft-cap."""
    assert output.softcap is None or not kind.label_smoothing  # loss_for_softcap
    weights = token_weights(targets, loss_weights)
    # Inside a Function's forward grad mode is always off: read it here.
    need_grad = torch.is_grad_enabled() and (hidden.requires_grad or output.weight.requires_grad)
    loss_sum, each, *terms = _FusedCrossEntropy.apply(  # pyright: ignore[reportGeneralTypeIssues]
        hidden, *output, targets, weights, need_grad, kind, liger_forward
    )
    return LossSums(loss_sum, weights.sum(), each, tuple(terms))
