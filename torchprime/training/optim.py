"""Optimizers as pure tensor operations, and learning-rate schedules as pure functions of the step.

An optimizer here is a list of state slots per parameter and an in-place update. It reads nothing on
the host and uses no Python number that changes from step to step: learning rate and step count are
tensors, so one compiled graph serves all steps. State is fp32, and bf16 parameters get an fp32
master copy unless `master_weights=false`: a bf16 weight of 1.0 can't take a step below 0.004.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Slot(NamedTuple):
    """A state tensor, initially zero, and the dims of its parameter that it keeps."""

    dims: tuple[int, ...]


Mean = Callable[[Tensor, tuple[int, ...]], Tensor]


def mean_over(values: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Return the mean over some dims, which stay with size 1."""
    return values.mean(dim=dims, keepdim=True)


class Parameter(NamedTuple):
    """Facts about one parameter that an optimizer may use."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    decays: bool  # weight decay applies: matrices and embeddings, not norms and biases
    stacked: bool  # dim 0 counts layers: statistics are per layer
    # Returns the mean over dims of the whole parameter, for values sharded like it; if this process
    # holds only a shard, it communicates with the others.
    mean: Mean = mean_over


class Optimizer(Protocol):
    """An optimizer: state slots by name, and an in-place update of one parameter."""

    def slots(self, parameter: Parameter) -> dict[str, Slot]: ...

    def update(
        self,
        parameter: Parameter,
        weight: Tensor,
        gradient: Tensor,
        state: Mapping[str, Tensor],
        lr: Tensor,
        step: Tensor,
    ) -> dict[str, Tensor]:
        """Return the new values: the fp32 weight under "weight", and each slot under its name."""
        ...


def _every_dim(parameter: Parameter) -> tuple[int, ...]:
    return tuple(range(len(parameter.shape)))


class AdamW:
    """Adam with decoupled weight decay (Loshchilov & Hutter, arXiv:1711.05101, algorithm 2)."""

    def __init__(
        self,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        self.betas, self.eps, self.weight_decay = betas, eps, weight_decay

    def slots(self, parameter: Parameter) -> dict[str, Slot]:
        every = _every_dim(parameter)
        return {"exp_avg": Slot(every), "exp_avg_sq": Slot(every)}

    def update(
        self,
        parameter: Parameter,
        weight: Tensor,
        gradient: Tensor,
        state: Mapping[str, Tensor],
        lr: Tensor,
        step: Tensor,
    ) -> dict[str, Tensor]:
        beta1, beta2 = self.betas
        mean = beta1 * state["exp_avg"] + (1 - beta1) * gradient
        square = beta2 * state["exp_avg_sq"] + (1 - beta2) * gradient * gradient
        # 1 - beta^step, computed so that fp32 does not lose three digits at step 1.
        correction1, correction2 = (
            -torch.expm1(step * math.log(beta)) if beta else torch.ones_like(step)
            for beta in self.betas
        )
        denominator = (square / correction2).sqrt() + self.eps
        if parameter.decays and self.weight_decay:
            weight = weight * (1 - lr * self.weight_decay)
        weight = weight - (lr / correction1) * (mean / denominator)
        return {"weight": weight, "exp_avg": mean, "exp_avg_sq": square}


class Adafactor:
    """Adafactor (Shazeer & Stern 2018, arXiv:1804.04235) with a given learning rate, no momentum.

    Second moments of matrices are kept as row and column means (algorithm 4), the update is clipped
    to root mean square 1 (section 6), the decay is 1 - step^-0.8 (section 7.2). `eps` is the
    paper's epsilon_1, added to squared gradients.
    """

    def __init__(self, eps: float = 1e-30, weight_decay: float = 0.0, clip: float = 1.0) -> None:
        self.eps, self.weight_decay, self.clip = eps, weight_decay, clip

    def slots(self, parameter: Parameter) -> dict[str, Slot]:
        every = _every_dim(parameter)
        if len(every) - parameter.stacked < 2:
            return {"exp_avg_sq": Slot(every)}
        return {
            "exp_avg_sq_row": Slot(every[:-1]),
            "exp_avg_sq_col": Slot((*every[:-2], every[-1])),
        }

    def update(
        self,
        parameter: Parameter,
        weight: Tensor,
        gradient: Tensor,
        state: Mapping[str, Tensor],
        lr: Tensor,
        step: Tensor,
    ) -> dict[str, Tensor]:
        beta, mean = 1 - torch.pow(step, -0.8), parameter.mean
        square = gradient * gradient + self.eps
        new: dict[str, Tensor] = {}
        if "exp_avg_sq_row" in state:
            # The parameter's dims, with the averaged one as size 1.
            row = beta * state["exp_avg_sq_row"][..., None] + (1 - beta) * mean(square, (-1,))
            column = beta * state["exp_avg_sq_col"][..., None, :] + (1 - beta) * mean(square, (-2,))
            new.update(exp_avg_sq_row=row.squeeze(-1), exp_avg_sq_col=column.squeeze(-2))
            scale = (row / mean(row, (-2,))).rsqrt() * column.rsqrt()
        else:
            new["exp_avg_sq"] = beta * state["exp_avg_sq"] + (1 - beta) * square
            scale = new["exp_avg_sq"].rsqrt()
        update = scale * gradient
        own_dims = tuple(range(int(parameter.stacked), update.dim()))
        size = mean(update.pow(2), own_dims).sqrt()
        update = update / (size / self.clip).clamp(min=1.0)
        if parameter.decays and self.weight_decay:
            weight = weight * (1 - lr * self.weight_decay)
        return {"weight": weight - lr * update, **new}


def make_optimizer(
    name: str, *, betas: tuple[float, float], eps: float | None, weight_decay: float
) -> Optimizer:
    """Make `adamw` or `adafactor` from the config's values; eps None takes the method's own
    default."""
    if name == "adamw":
        return AdamW(betas, 1e-8 if eps is None else eps, weight_decay)
    return Adafactor(1e-30 if eps is None else eps, weight_decay)


def decays(name: str) -> bool:
    """Return True for matrices and embeddings, which get weight decay, not norms and biases, as in
    HF's Trainer."""
    return not (name.endswith("bias") or "norm" in name)


def schedule_note(rate: Callable[[int], float], *, peak: float, total_steps: int) -> str | None:
    """Return a note on unusual learning rates of a run; None if they reach the peak.

    Args:
        rate: of the 0-based step.
    """
    if any(rate(step) >= 0.999 * peak for step in range(total_steps)):
        return None
    highest = max(map(rate, range(total_steps)))
    fix = "Lower task.lr_scheduler.warmup_steps (or warmup_ratio), or train longer."
    if highest == 0:
        return (
            "the learning rate is 0 in every update, so nothing will be trained: a warm-up begins "
            f"at 0, and the run ends within it, after {total_steps:,}. {fix}"
        )
    return (
        f"the warm-up is longer than the run: after {total_steps:,} updates the learning rate has "
        f"reached {highest:.2e} of {peak:.2e}. {fix}"
    )


def learning_rate(
    step: int,
    *,
    peak: float,
    total_steps: int,
    schedule: str,
    warmup_steps: int,
    min_lr_ratio: float,
) -> float:
    """Return the learning rate used in update number `step` (0-based).

    Warm-up rises linearly from 0 to the peak over `warmup_steps` updates, like transformers'
    schedules: update 0 of a warm-up has learning rate 0. Then it is constant, linear, or half a
    cosine down to peak x min_lr_ratio at `total_steps`.
    """
    if step < warmup_steps:
        return peak * step / warmup_steps
    if schedule == "constant":
        return peak
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    progress = min(1.0, progress)
    falling = 1 - progress if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return peak * (min_lr_ratio + (1 - min_lr_ratio) * falling)
