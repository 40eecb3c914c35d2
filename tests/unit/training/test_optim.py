"""Optimizers against torch's and transformers' own, and schedules against transformers'."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
import transformers
from transformers.optimization import Adafactor as HFAdafactor

from torchprime.config.compose import compose_config
from torchprime.training.optim import (
    Adafactor,
    AdamW,
    Parameter,
    decays,
    learning_rate,
    make_optimizer,
    schedule_note,
)
from torchprime.training.step import clipped

SHAPES = {"a": (6, 5), "norm": (7,), "b": (4, 3)}


def _run_ours(optimizer, weights, gradients, lr: float, stacked: bool = False):
    """Apply the update rule as the step does, in plain Python."""
    infos = {n: Parameter(tuple(w.shape), w.dtype, decays(n), stacked) for n, w in weights.items()}
    state = {
        n: {
            s: torch.zeros([i.shape[d] for d in slot.dims])
            for s, slot in optimizer.slots(i).items()
        }
        for n, i in infos.items()
    }
    weights = {n: w.clone() for n, w in weights.items()}
    for step, grads in enumerate(gradients, start=1):
        for n, g in grads.items():
            new = optimizer.update(
                infos[n], weights[n], g, state[n], torch.tensor(lr), torch.tensor(float(step))
            )
            weights[n] = new.pop("weight")
            state[n] = new
    return weights


def _case():
    g = torch.Generator().manual_seed(0)
    weights = {n: torch.randn(s, generator=g) for n, s in SHAPES.items()}
    grads = [{n: torch.randn(s, generator=g) for n, s in SHAPES.items()} for _ in range(6)]
    return weights, grads


def test_adamw_is_torchs_adamw() -> None:
    weights, gradients = _case()
    params = {n: torch.nn.Parameter(w.clone()) for n, w in weights.items()}
    groups = [
        {"params": [p for n, p in params.items() if n != "norm"], "weight_decay": 0.1},
        {"params": [params["norm"]], "weight_decay": 0.0},
    ]
    reference = torch.optim.AdamW(groups, lr=3e-2, betas=(0.8, 0.95), eps=1e-6)
    for grads in gradients:
        for n, g in grads.items():
            params[n].grad = g
        reference.step()
    ours = _run_ours(AdamW((0.8, 0.95), 1e-6, 0.1), weights, gradients, 3e-2)
    for n, p in params.items():
        torch.testing.assert_close(ours[n], p.data, rtol=2e-6, atol=1e-6)


def test_adafactor_is_transformers_adafactor() -> None:
    weights, gradients = _case()
    params = {n: torch.nn.Parameter(w.clone()) for n, w in weights.items()}
    reference = HFAdafactor(
        params.values(), lr=3e-2, relative_step=False, scale_parameter=False, warmup_init=False
    )
    for grads in gradients:
        for n, g in grads.items():
            params[n].grad = g
        reference.step()
    ours = _run_ours(Adafactor(), weights, gradients, 3e-2)
    for n, p in params.items():
        torch.testing.assert_close(ours[n], p.data, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("optimizer", [AdamW(weight_decay=0.1), Adafactor(weight_decay=0.1)])
def test_a_stack_of_layers_is_updated_like_each_layer(optimizer) -> None:
    """Scan keeps all layers in one tensor; no statistic may mix them."""
    g = torch.Generator().manual_seed(1)
    for shape in ((6, 5), (7,)):
        layers = [{"w": torch.randn(shape, generator=g)} for _ in range(3)]
        grads = [[{"w": torch.randn(shape, generator=g)} for _ in range(4)] for _ in layers]
        apart = [_run_ours(optimizer, w, gs, 0.1)["w"] for w, gs in zip(layers, grads, strict=True)]
        together = _run_ours(
            optimizer,
            {"w": torch.stack([w["w"] for w in layers])},
            [{"w": torch.stack([gs[t]["w"] for gs in grads])} for t in range(4)],
            0.1,
            stacked=True,
        )["w"]
        torch.testing.assert_close(together, torch.stack(apart))


@pytest.mark.parametrize("name", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("warmup", [0, 7])
def test_schedules_are_transformers_schedules(name: str, warmup: int) -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    reference = torch.optim.SGD([parameter], lr=2.0)
    kind = "constant_with_warmup" if name == "constant" else name
    scheduler = transformers.get_scheduler(kind, reference, warmup, 50)
    for step in range(50):
        ours = learning_rate(
            step, peak=2.0, total_steps=50, schedule=name, warmup_steps=warmup, min_lr_ratio=0.0
        )
        assert ours == pytest.approx(scheduler.get_last_lr()[0], abs=1e-12)
        reference.step()
        scheduler.step()


def test_min_lr_ratio_is_what_is_left_at_the_end() -> None:
    for name in ("linear", "cosine"):
        rates = [
            learning_rate(
                s, peak=1.0, total_steps=10, schedule=name, warmup_steps=0, min_lr_ratio=0.1
            )
            for s in range(11)
        ]
        assert rates[0] == 1.0 and rates[-1] == pytest.approx(0.1) and min(rates) == rates[-1]


def test_first_beta_may_be_zero() -> None:
    weights, gradients = _case()
    params = {n: torch.nn.Parameter(w.clone()) for n, w in weights.items()}
    reference = torch.optim.AdamW(params.values(), lr=1e-2, betas=(0.0, 0.9), weight_decay=0.0)
    for grads in gradients:
        for n, g in grads.items():
            params[n].grad = g
        reference.step()
    ours = _run_ours(AdamW((0.0, 0.9)), weights, gradients, 1e-2)
    for n, p in params.items():
        torch.testing.assert_close(ours[n], p.data, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize(("name", "eps"), [("adamw", 1e-8), ("adafactor", 1e-30)])
def test_each_method_has_its_own_epsilon_from_the_config(name: str, eps: float) -> None:
    """Adafactor adds it to squared gradients: AdamW's 1e-8 there would swallow small ones."""
    config = compose_config(
        ["model.pretrained_model=x", "task.max_steps=1", f"task.optimizer.name={name}"]
    )
    o = config.task.optimizer
    made = make_optimizer(o.name, betas=o.betas, eps=o.eps, weight_decay=o.weight_decay)
    assert isinstance(made, AdamW | Adafactor) and made.eps == eps


def test_clipping_is_torchs_two_functions_in_a_row() -> None:
    _, (grads, *_) = _case()
    params = [torch.nn.Parameter(torch.zeros_like(g)) for g in grads.values()]
    for p, g in zip(params, grads.values(), strict=True):
        p.grad = g.clone()
    norm = torch.nn.utils.clip_grad_norm_(params, 2.0)
    torch.nn.utils.clip_grad_value_(params, 0.3)
    ours = list(clipped(grads.values(), norm, 2.0, 0.3))
    for p, g in zip(params, ours, strict=True):
        torch.testing.assert_close(g, p.grad)
    assert next(clipped(grads.values(), norm, None, None)) is grads["a"]


@pytest.mark.parametrize(
    ("total", "warmup", "said"),
    [
        (10, 0, None),
        (10, 9, None),
        (1, 1, "learning rate is 0 in every update"),
        (1, 50, "learning rate is 0 in every update"),
        (10, 10, "after 10 updates the learning rate has reached 9.00e-04 of 1.00e-03"),
        (10, 100, "after 10 updates the learning rate has reached 9.00e-05 of 1.00e-03"),
    ],
)
def test_a_run_that_ends_in_its_warm_up_is_told(total: int, warmup: int, said: str | None) -> None:
    for schedule in ("linear", "cosine", "constant"):
        rate = partial(
            learning_rate,
            peak=1e-3,
            total_steps=total,
            schedule=schedule,
            warmup_steps=warmup,
            min_lr_ratio=0.0,
        )
        note = schedule_note(rate, peak=1e-3, total_steps=total)
        assert (note is None) if said is None else (note is not None and said in note)


def test_the_plan_is_followed_by_the_note(
    run: Callable, command: Callable, tmp_path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = ["task.max_steps=1", "task.lr_scheduler.warmup_steps=5", f"output_dir={tmp_path}"]
    assert run(command("dry_run=true", *short)) == 0
    assert "note: the learning rate is 0 in every update" in capsys.readouterr().err
