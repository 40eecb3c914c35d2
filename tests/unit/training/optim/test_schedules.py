"""Schedules against transformers', at every step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers

from torchprime.training.optim.schedules import Schedule, schedule_note

TOTAL = 50
# Our name and settings, then transformers' name and settings.
SAME: list[tuple[str, dict[str, Any], str, dict[str, Any]]] = [
    ("linear", {}, "linear", {}),
    ("cosine", {}, "cosine", {}),
    ("constant", {}, "constant_with_warmup", {}),
    ("inverse_sqrt", {}, "inverse_sqrt", {}),
    ("cosine_with_restarts", {"cycles": 1}, "cosine_with_restarts", {"num_cycles": 1}),
    ("cosine_with_restarts", {"cycles": 3}, "cosine_with_restarts", {"num_cycles": 3}),
    *(
        (
            "wsd",
            {"decay_steps": 12, "decay_shape": ours},
            "warmup_stable_decay",
            {"num_decay_steps": 12, "decay_type": theirs},
        )
        for ours, theirs in (("linear", "linear"), ("cosine", "cosine"), ("sqrt", "1-sqrt"))
    ),
]


@pytest.mark.parametrize(("name", "ours", "kind", "theirs"), SAME, ids=str)
@pytest.mark.parametrize("warmup", [0, 7])
def test_schedules_are_transformers_schedules(
    name: str, ours: dict, kind: str, theirs: dict, warmup: int
) -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    reference = torch.optim.SGD([parameter], lr=2.0)
    scheduler = transformers.get_scheduler(
        kind, reference, warmup, TOTAL, scheduler_specific_kwargs=theirs
    )
    schedule = Schedule(name, 2.0, TOTAL, warmup_steps=warmup, **ours)
    for step in range(TOTAL + 1):
        assert schedule.rate(step) == pytest.approx(scheduler.get_last_lr()[0], abs=1e-12)
        reference.step()
        scheduler.step()


@pytest.mark.parametrize("name", ["linear", "cosine", "cosine_with_restarts", "wsd"])
def test_min_lr_ratio_is_what_is_left_at_the_end(name: str) -> None:
    schedule = Schedule(name, 1.0, 10, min_lr_ratio=0.1, decay_steps=4)
    rates = [schedule.rate(step) for step in range(11)]
    assert rates[0] == 1.0 and rates[-1] == pytest.approx(0.1) and min(rates) == rates[-1]


def test_exponential_rises_by_equal_factors() -> None:
    schedule = Schedule("exponential", 0.1, 25, min_lr_ratio=1e-6)
    rates = [schedule.rate(step) for step in range(25)]
    assert rates[0] == pytest.approx(1e-7) and rates[-1] == pytest.approx(0.1)
    factors = [b / a for a, b in zip(rates, rates[1:], strict=False)]
    assert factors == pytest.approx([10 ** (6 / 24)] * 24)


def test_inverse_sqrt_does_not_fall_below_min_lr_ratio() -> None:
    schedule = Schedule("inverse_sqrt", 1.0, 1000, warmup_steps=4, min_lr_ratio=0.1)
    assert schedule.rate(16) == pytest.approx(0.5) and schedule.rate(999) == 0.1


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
    for name in ("linear", "cosine", "constant", "inverse_sqrt"):
        rate = Schedule(name, 1e-3, total, warmup_steps=warmup).rate
        note = schedule_note(rate, peak=1e-3, total_steps=total)
        assert (note is None) if said is None else (note is not None and said in note)


def test_the_plan_is_followed_by_the_note(
    run: Callable, command: Callable, tmp_path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = ["task.max_steps=1", "task.lr_scheduler.warmup_steps=5", f"output_dir={tmp_path}"]
    assert run(command("dry_run=true", *short)) == 0
    assert "note: the learning rate is 0 in every update" in capsys.readouterr().err


def test_a_decay_longer_than_the_run_is_refused(
    run: Callable, command: Callable, tmp_path, capsys: pytest.CaptureFixture[str]
) -> None:
    wsd = ["task.lr_scheduler={name: wsd, warmup_steps: 2, decay_steps: 9}", "task.max_steps=10"]
    assert run(command("dry_run=true", *wsd, f"output_dir={tmp_path}")) == 2
    assert "a warm-up of 2 updates and a decay of 9" in capsys.readouterr().err
