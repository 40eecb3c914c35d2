"""The verdict: what flips it, what does not, and where its bands come from.

The expected numbers are worked out here, from the values that went in.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from torchprime.compare.align import relative
from torchprime.compare.judge import compare
from torchprime.compare.logs.numbers_in_text import half_digits
from torchprime.compare.logs.run import LoggedStep, Run
from torchprime.compare.noise_floor import NoiseFloor, measure_noise, read_floor, running_max
from torchprime.compare.verdict import (
    AGREE,
    DIFFER,
    DIFFERENT_DATA,
    NOT_JUDGED,
    TOO_FEW,
    Comparison,
)
from torchprime.errors import ConfigError, DataError

STEPS = 60


def make(label: str = "a", steps: int = STEPS, dtype: str | None = "float32", **others: Any) -> Run:
    """A run whose losses fall; `changes` alters fields of single steps."""
    changes: Mapping[int, Mapping[str, Any]] = others.pop("changes", {})
    logged = {
        step: LoggedStep(
            step,
            loss=1 + 4 / step,
            grad_norm=2 + 3 / step,
            lr=1e-3 * step / steps,
            supervised_tokens=1000 + step,
            batch_hash=f"hash{step}",
            supervised_tokens_per_s=2000.0,
        )
        for step in range(1, steps + 1)
    }
    for step, values in changes.items():
        logged[step] = replace(logged[step], **values)
    facts = {} if dtype is None else {"model": {"dtype": dtype}}
    return Run(label, f"runs/{label}", "metrics.jsonl", logged, facts=facts, **others)


def changed(step: int, label: str = "b", **factors: float) -> Run:
    """The run with fields of a step multiplied."""
    old = make().steps[step]
    new = {name: getattr(old, name) * factor for name, factor in factors.items()}
    return make(label, changes={step: new})


def judge(*runs: Run, **options: Any) -> Comparison:
    return compare([make(), *runs], **options)


# Verdicts in float32 ------------------------------------------------------------------------------


def test_equal_runs_agree() -> None:
    result = judge(make("b"), make("c"))
    assert result.verdict == AGREE and result.common == STEPS
    assert [pair.verdict for pair in result.pairs] == [AGREE, AGREE]
    assert all(q.worst.relative == 0 for q in result.pairs[0].quantities.values())


@pytest.mark.parametrize(
    ("name", "within", "beyond"),
    [("loss", 9e-5, 2e-4), ("grad_norm", 9e-4, 2e-3), ("lr", 9e-7, 2e-6)],
)
@pytest.mark.parametrize("sign", [1, -1])
def test_one_number_of_one_step_flips_the_verdict(
    name: str, within: float, beyond: float, sign: int
) -> None:
    assert judge(changed(57, "b", **{name: 1 + sign * within})).verdict == AGREE
    result = judge(make("b"), changed(57, "c", **{name: 1 + sign * beyond}))
    assert result.verdict == DIFFER
    assert [pair.verdict for pair in result.pairs] == [AGREE, DIFFER]
    found = result.pairs[1].first_beyond
    assert found is not None and (found[0], found[1].step) == (name, 57)
    reference = getattr(make().steps[57], name)
    assert found[1].reference == reference
    assert found[1].value == pytest.approx(reference * (1 + sign * beyond))
    assert found[1].relative == pytest.approx(beyond, rel=1e-6)
    assert result.pairs[1].quantities[name].worst == found[1]


def test_the_first_step_out_of_its_band_is_not_the_worst_one() -> None:
    old = make().steps
    changes = {
        s: {"loss": (old[s].loss or 0) * f} for s, f in [(9, 1.0002), (20, 1.5), (3, 1.00005)]
    }
    pair = judge(make("b", changes=changes)).pairs[0]
    loss = pair.quantities["loss"]
    assert loss.first_beyond and loss.first_beyond.step == 9 and loss.worst.step == 20
    assert loss.to_dict()["beyond"] == 2


def test_only_the_common_steps_count() -> None:
    short = replace(make("b"), steps={s: x for s, x in make().steps.items() if s % 10 == 0})
    late = replace(make("c"), steps={s: x for s, x in make().steps.items() if s > 15})
    result = judge(short, late)
    assert result.steps == (20, 30, 40, 50, 60) and result.common == 5
    # A step that the third lacks is not judged for the second either.
    off = replace(short, steps={**short.steps, 10: replace(short.steps[10], loss=9.0)})
    assert judge(off, late).verdict == AGREE
    assert judge(off).verdict == DIFFER


def test_no_common_step_is_an_error_that_says_who_has_which() -> None:
    late = replace(make("b"), steps={100: LoggedStep(100, loss=1.0)})
    with pytest.raises(DataError, match=r"a: 60 from 1 to 60, b: 1 from 100 to 100"):
        judge(late)


def test_steps_limits_what_is_judged() -> None:
    off = changed(57, loss=1.01)
    assert judge(off, steps=56).verdict == AGREE
    assert judge(off, steps=57).verdict == DIFFER
    assert judge(off, steps=56).to_dict()["steps"] == {
        "common": 60, "judged": 56, "first": 1, "last": 56,
    }  # fmt: skip


def test_beyond_the_promised_steps_it_is_said_that_rounding_grows() -> None:
    def at(step: int) -> list[str]:
        off = make("b", steps=150)
        off = replace(off, steps={**off.steps, step: replace(off.steps[step], loss=9.0)})
        result = compare([make(steps=150), off])
        assert result.verdict == DIFFER
        return [note for note in result.pairs[0].notes if "--steps 100" in note]

    assert at(101) and not at(100)


def test_a_given_tolerance_replaces_the_losses_band_alone() -> None:
    assert judge(changed(5, loss=1.05), loss_tolerance=0.06).verdict == AGREE
    assert judge(changed(5, loss=1.05), loss_tolerance=0.04).verdict == DIFFER
    assert judge(changed(5, grad_norm=1.05), loss_tolerance=0.06).verdict == DIFFER
    result = judge(make("b"), loss_tolerance=0.0)
    assert result.verdict == AGREE
    assert result.to_dict()["tolerances"]["loss"] == {
        "relative": 0.0, "from": "given as --loss-tolerance",
    }  # fmt: skip


def test_held_out_losses_are_judged_at_their_own_steps() -> None:
    ours = replace(make(), heldout={0: 7.0, 33: 3.0})
    same = replace(make("b"), heldout={0: 7.0, 33: 3.0, 99: 1.0})
    off = replace(make("c"), heldout={0: 7.0, 33: 3.001})
    result = compare([ours, same, off])
    assert [pair.verdict for pair in result.pairs] == [AGREE, DIFFER]
    found = result.pairs[1].first_beyond
    assert found and found[0] == "eval_loss" and found[1].step == 33
    assert found[1].relative == pytest.approx(0.001 / 3)
    assert len(result.pairs[0].quantities["eval_loss"].points) == 2
    assert compare([ours, off], steps=32).verdict == AGREE


# Data ---------------------------------------------------------------------------------------------


def test_one_other_hash_is_other_data_and_nothing_else_is_looked_at() -> None:
    off = make("c", changes={31: {"batch_hash": "hash32"}, 40: {"batch_hash": "other"}})
    result = judge(changed(5, loss=2.0), off)
    assert result.verdict == DIFFERENT_DATA
    assert [pair.verdict for pair in result.pairs] == [NOT_JUDGED, DIFFERENT_DATA]
    assert not any(pair.quantities for pair in result.pairs)
    assert result.pairs[1].data.to_dict()["first_difference"] == {
        "step": 31,
        "what": "batch_hash",
        "reference": "hash31",
        "value": "hash32",
        "reference_has_it_at_step": 32,
    }


def test_other_supervised_tokens_are_other_data_even_without_hashes() -> None:
    bare = {step: {"batch_hash": None} for step in range(1, STEPS + 1)}
    off = make("b", changes=bare | {4: {"batch_hash": None, "supervised_tokens": 7}})
    result = judge(off)
    assert result.verdict == DIFFERENT_DATA
    first = result.pairs[0].data.first_difference
    assert first and (first.step, first.reference, first.value) == (4, 1004, 7)


def test_data_that_cannot_be_checked_is_neither_same_nor_different() -> None:
    bare = {step: {"batch_hash": None} for step in range(1, STEPS + 1)}
    result = judge(make("b", changes=bare))
    check = result.pairs[0].data
    assert result.verdict == AGREE and check.same is None
    assert (check.hashes, check.tokens) == (0, STEPS)
    some = judge(make("b", changes={1: {"batch_hash": None}})).pairs[0].data
    assert some.same is True and some.hashes == STEPS - 1


# Numbers that are none, or missing ----------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_agrees_with_nothing(value: float) -> None:
    broken = {20: {"loss": value}}
    for ours, theirs in [({}, broken), (broken, {}), (broken, broken)]:
        result = compare([make(changes=ours), make("b", changes=theirs)])
        assert result.verdict == DIFFER
        found = result.pairs[0].first_beyond
        assert found and (found[0], found[1].step) == ("loss", 20)
        text = json.dumps(result.to_dict(), allow_nan=False)  # parity.json stays JSON
        assert f'"{value}"' in text and '"inf"' in text


def test_missing_values_are_not_compared_but_counted() -> None:
    result = judge(make("b", changes={3: {"grad_norm": None}, 4: {"lr": None}}))
    assert result.verdict == AGREE
    assert result.pairs[0].notes == (
        "grad_norm: both have it at 59 of 60 common steps",
        "lr: both have it at 59 of 60 common steps",
    )
    assert len(result.pairs[0].quantities["grad_norm"].points) == 59


def test_runs_without_a_common_loss_cannot_be_compared() -> None:
    ours = replace(make(), steps={1: LoggedStep(1, loss=1.0), 2: LoggedStep(2)})
    theirs = replace(make("b"), steps={1: LoggedStep(1), 2: LoggedStep(2, loss=1.0)})
    with pytest.raises(DataError, match="no loss that both have"):
        compare([ours, theirs])


def test_a_zero_is_equal_to_zero_alone() -> None:
    assert relative(0.0, 0.0) == 0 and relative(0.0, 1e-30) == math.inf
    zero = {1: {"lr": 0.0}}
    assert compare([make(changes=zero), make("b", changes=zero)]).verdict == AGREE
    assert compare([make(changes=zero), make("b", changes={1: {"lr": 1e-9}})]).verdict == DIFFER


# Other logs' numbers ------------------------------------------------------------------------------


def _hf(losses: Mapping[int, float], over: int) -> Run:
    steps = {s: LoggedStep(s, loss=x, mean_over=over) for s, x in losses.items()}
    return Run("hf", "hf", "trainer_state.json", steps)


def test_means_over_steps_are_compared_with_means() -> None:
    means = {
        last: float(sum(1 + Fraction(4, s) for s in range(last - 9, last + 1)) / 10)
        for last in range(10, STEPS + 1, 10)
    }
    result = judge(_hf(means, 10))
    assert result.verdict == AGREE and len(result.steps) == 6
    assert result.pairs[0].quantities["loss"].worst.relative < 1e-12
    # The same numbers taken as those of the steps themselves would not agree.
    assert judge(_hf(means, 1)).verdict == DIFFER
    means[40] *= 1.0002
    assert judge(_hf(means, 10)).verdict == DIFFER
    # The other way round, and both of them means.
    assert compare([_hf(means, 10), make("b")]).verdict == DIFFER
    assert compare([_hf(means, 10), replace(_hf(means, 10), label="x")]).verdict == AGREE


def test_a_mean_of_which_steps_are_missing_is_not_compared() -> None:
    ours = replace(make(), steps={s: x for s, x in make().steps.items() if s % 2 == 0})
    with pytest.raises(DataError, match="means over several steps"):
        compare([ours, _hf({10: 2.0, 20: 1.5}, 10)])


def test_printed_numbers_widen_the_band_by_what_they_hide() -> None:
    exact = make().steps

    def printed(shift: float) -> Run:
        steps = {
            s: LoggedStep(s, loss=round(x.loss or 0, 2) + shift, rounding={"loss": 0.005})
            for s, x in exact.items()
        }
        return Run("log", "log", "text log", steps)

    assert judge(printed(0.0)).verdict == AGREE
    result = judge(printed(0.01))
    assert result.verdict == DIFFER
    point = result.pairs[0].quantities["loss"].points[3]  # step 4: a loss of 2
    assert point.band == pytest.approx(1e-4 + 0.005 / 2)


def test_a_printed_zero_is_near_to_what_is_rounded_to_it() -> None:
    tiny = make(changes={1: {"lr": 4e-7}})

    def at(lr: float) -> Run:
        return make("b", changes={1: {"lr": lr, "rounding": {"lr": 5e-7}}})

    assert compare([at(0.0), tiny]).verdict == AGREE
    assert compare([tiny, at(0.0)]).verdict == AGREE
    assert compare([at(0.0), make(changes={1: {"lr": 6e-7}})]).verdict == DIFFER
    assert compare([make(changes={1: {"lr": 6e-7}}), at(0.0)]).verdict == DIFFER


def printed_lr(form: str, factor: float = 1.0) -> Run:
    """A text log of the run's learning rates, as a trainer prints them."""
    steps = make().steps
    texts = [format(factor * (steps[s].lr or 0), form) for s in steps]
    halves = half_digits(texts, 3)
    logged = {
        s: replace(steps[s], lr=float(text), rounding={"lr": half} if half else {})
        for s, text, half in zip(steps, texts, halves, strict=True)
    }
    return replace(make("log"), steps=logged)


@pytest.mark.parametrize(
    ("form", "compared"),
    [
        (".4e", 60),
        (".2e", 60),
        (".6f", 58),  # from 5.0e-05 on: 0.000050 hides 1% of it
        (".4f", 0),  # 0.0001 to 0.0010
        (".1f", 0),  # 0.0 throughout
    ],
)
def test_a_rate_that_rounding_swallows_agrees_with_nothing(form: str, compared: int) -> None:
    """Rates go from 1.7e-5 to 1e-3. Whatever is compared is compared to 1% at least."""
    result = judge(printed_lr(form))
    assert result.verdict == AGREE
    found = result.pairs[0].quantities.get("lr")
    points = found.points if found else ()
    assert len(points) == compared and all((p.band or 1) <= 0.0101 for p in points)
    notes = [note for note in result.pairs[0].notes if "rounding in a log hides" in note]
    assert bool(notes) == (compared < 60)
    # Another rate is told wherever it is further away than what rounding hides.
    assert judge(printed_lr(form, 1.5)).verdict == (AGREE if form == ".1f" else DIFFER)


def test_a_loss_that_rounding_swallows_is_not_compared() -> None:
    """Losses printed as 2.0 and 1.1, where 0.05 may hide 5%."""
    steps = {s: LoggedStep(s, loss=round(x.loss or 0, 1), rounding={"loss": 0.05})
             for s, x in make().steps.items()}  # fmt: skip
    result = judge(Run("log", "log", "text log", steps))
    assert result.verdict == AGREE
    assert len(result.pairs[0].quantities["loss"].points) == 60  # all are above 1
    small = {s: replace(x, loss=x.loss and x.loss / 2) for s, x in steps.items()}
    half = {s: {"loss": (x.loss or 0) / 2} for s, x in make().steps.items()}
    with pytest.raises(DataError, match="At 40 of them rounding hides more than 5%"):
        late = {s: x for s, x in small.items() if s > 20}
        compare([make(changes=half), Run("log", "log", "text log", late)])


# Coverage of the comparison -----------------------------------------------------------------------


def only(steps: Iterable[int], label: str = "b") -> Run:
    wanted = set(steps)
    return replace(make(label), steps={s: x for s, x in make().steps.items() if s in wanted})


@pytest.mark.parametrize(
    ("steps", "verdict", "told"),
    [
        ([1], TOO_FEW, "1 of 60 steps"),
        ([60], TOO_FEW, "1 of 60 steps"),
        ([1, 60], TOO_FEW, "2 of 60 steps"),
        (range(1, 13), TOO_FEW, "12 of 60 steps"),  # two tenths
        (range(1, 14), AGREE, "13 of 60 steps"),
        (range(20, 61, 20), AGREE, "3 of 60 steps"),
        (range(1, 61), AGREE, "60 steps"),
    ],
)
def test_agreement_at_few_steps_is_none(steps: Iterable[int], verdict: str, told: str) -> None:
    for runs in ([make(), only(steps)], [only(steps), make("b")]):
        result = compare(runs)
        assert result.verdict == verdict and result.told_steps == told
    found = result.to_dict()["pairs"][0]["coverage"]
    assert found is not None
    assert (found["of"], found["of_stretches"], found["needed"]) == (60, 10, 3)
    # Asked for by name, the first steps are judged for themselves; and a difference is one.
    assert judge(only(steps), steps=len(list(steps))).verdict != DIFFER
    first = min(steps)
    off = replace(only(steps), steps={**only(steps).steps, first: LoggedStep(first, loss=9.0)})
    assert judge(off).verdict == DIFFER


def test_steps_asked_for_are_judged_for_themselves() -> None:
    result = judge(only(range(1, 6)), steps=5)
    assert result.verdict == AGREE and result.told_steps == "5 steps"
    result = judge(only([1, 60]), steps=2)
    assert result.verdict == TOO_FEW and result.told_steps == "2 of 60 steps"


def test_short_runs_need_no_more_than_they_have() -> None:
    for steps in (1, 2, 3, 8):
        result = compare([make(steps=steps), make("b", steps=steps)])
        assert result.verdict == AGREE
    assert compare([only(range(1, 9), "a"), only([1, 2])]).verdict == TOO_FEW


def test_a_log_with_the_next_steps_learning_rate_is_recognised() -> None:
    steps = make().steps
    late = {s: {"lr": steps[s + 1].lr} for s in range(1, STEPS)}
    result = judge(make("b", changes=late))
    assert result.verdict == DIFFER
    assert any("scheduler" in note for note in result.pairs[0].notes)
    other = {s: {"lr": 2 * (steps[s].lr or 0)} for s in range(1, STEPS)}
    assert not any("scheduler" in n for n in judge(make("b", changes=other)).pairs[0].notes)


# Other differences --------------------------------------------------------------------------------


def test_what_else_differs_is_listed() -> None:
    facts = {
        "command": "x",
        "versions": {"torch": "2.9.1", "numpy": "1"},
        "mesh": {"fsdp": 4, "tensor": 1},
        "model": {"dtype": "float32"},
        "plan": {"memory": 1},
    }
    other = facts | {"command": "y", "mesh": {"fsdp": 2, "tensor": 2}, "plan": {"memory": 2}}
    other |= {"versions": {"torch": "2.10"}}
    config = {"seed": 1, "run_name": "a", "output_dir": "o", "task": {"max_steps": 3}}
    result = compare(
        [
            replace(make(), facts=facts, config=config),
            replace(make("b"), facts=other, config=config | {"run_name": "b", "seed": 2}),
            replace(make("c"), facts={}, config={}),
        ]
    )
    assert result.pairs[0].differences == {
        "versions.torch": ("2.9.1", "2.10"),
        "versions.numpy": ("1", None),
        "mesh.fsdp": (4, 2),
        "mesh.tensor": (1, 2),
        "config.seed": (1, 2),
    }
    assert result.pairs[1].differences == {}  # nothing is known of it


# Noise floors -------------------------------------------------------------------------------------


def noisy(
    label: str, factors: Mapping[int, float], dtype: str = "bfloat16", steps: int = 40
) -> Run:
    """A run with losses and gradient norms multiplied at some steps."""
    base = make(steps=steps).steps
    changes = {
        s: {"loss": (base[s].loss or 0) * f, "grad_norm": (base[s].grad_norm or 0) * f}
        for s, f in factors.items()
    }
    return make(label, steps=steps, dtype=dtype, changes=changes)


def floor_of(*factors: Mapping[int, float], **options: Any) -> NoiseFloor:
    runs = [noisy(f"n{i}", each, **options) for i, each in enumerate([{}, *factors])]
    return measure_noise(runs)


def test_bf16_is_not_judged_without_a_noise_floor() -> None:
    runs = [noisy("a", {}), noisy("b", {})]
    result = compare(runs)
    assert result.verdict == NOT_JUDGED and result.bands["loss"] is None
    assert any("noise is measured" in note for note in result.notes)
    # A learning rate that is not the same is a difference in any dtype.
    off = replace(runs[1], steps={**runs[1].steps, 3: replace(runs[1].steps[3], lr=1.0)})
    assert compare([runs[0], off]).verdict == DIFFER


def test_mixed_dtypes_need_a_noise_floor() -> None:
    runs = [noisy("a", {}, dtype="float32"), noisy("b", {})]
    assert compare(runs).verdict == NOT_JUDGED
    assert compare(runs, floor=floor_of({5: 1.01})).verdict == AGREE


def test_the_floor_is_the_spread_of_all_its_runs() -> None:
    floor = floor_of({10: 1.002}, {10: 0.999, 20: 1.0005})
    assert floor.spreads["loss"][10] == pytest.approx(0.003)
    assert floor.spreads["grad_norm"][10] == pytest.approx(0.003)
    assert floor.spreads["loss"][20] == pytest.approx(0.0005)
    assert floor.spreads["loss"][21] == 0 and "eval_loss" not in floor.spreads
    assert [run.label for run in floor.runs] == ["n0", "n1", "n2"]


def test_the_band_is_three_times_the_largest_spread_around() -> None:
    floor = floor_of({10: 1.002, 30: 1.0001})
    band = floor.band("loss", 1e-4, "")
    assert band is not None
    for step in (5, 10, 15):
        assert band.at(step) == pytest.approx(0.006)
    for step in (4, 16, 24, 36):
        assert band.at(step) == 1e-4  # never below float32's
    for step in (25, 35):
        assert band.at(step) == pytest.approx(0.0003)

    def verdict(step: int, factor: float) -> str:
        return compare([noisy("a", {}), noisy("b", {step: factor})], floor=floor).verdict

    assert verdict(15, 1.0059) == AGREE and verdict(15, 1.0061) == DIFFER
    assert verdict(16, 1.0003) == DIFFER and verdict(16, 1.00009) == AGREE
    assert floor.band("eval_loss", 1e-4, "") is None


def test_between_the_floors_steps_the_wider_neighbour_counts() -> None:
    def thin(run: Run) -> Run:
        return replace(run, steps={s: x for s, x in run.steps.items() if s % 10 == 0})

    floor = measure_noise([thin(noisy("a", {})), thin(noisy("b", {40: 1.01}))])
    floor = replace(floor, window=1)
    band = floor.band("loss", 1e-4, "")
    assert band is not None
    assert [band.at(s) for s in (1, 10, 30)] == [1e-4] * 3
    assert band.at(31) == band.at(40) == pytest.approx(0.03)


def test_the_held_out_band_is_no_narrower_than_the_losses() -> None:
    runs = [
        replace(noisy("a", {}), heldout={0: 3.0, 10: 2.0, 40: 2.0}),
        replace(noisy("b", {10: 1.01}), heldout={0: 3.0, 10: 2.0, 40: 2.1}),
    ]
    floor = measure_noise(runs)
    wide = floor.band("eval_loss", 1e-4, "")
    narrow = replace(floor, window=1).band("eval_loss", 1e-4, "")
    assert wide is not None and narrow is not None
    assert wide.at(10) == pytest.approx(3 * 0.05)  # its own at 40, two records on
    assert narrow.at(10) == pytest.approx(3 * 0.01)  # the training loss's
    assert narrow.at(40) == pytest.approx(3 * 0.05) and narrow.at(0) == 1e-4


def test_a_floor_says_nothing_beyond_its_last_step() -> None:
    floor = floor_of({10: 1.01}, steps=20)
    runs = [noisy("a", {}), noisy("b", {})]
    with pytest.raises(DataError, match="--steps 20"):
        compare(runs, floor=floor)
    assert compare(runs, floor=floor, steps=20).verdict == AGREE


def test_a_floor_of_another_dtype_is_refused() -> None:
    floor = floor_of({10: 1.01}, steps=STEPS)
    with pytest.raises(DataError, match="measured in bfloat16"):
        judge(make("b"), floor=floor)
    with pytest.raises(DataError, match="float16"):
        compare([noisy("a", {}, dtype="float16"), noisy("b", {}, dtype="float16")], floor=floor)
    in_float32 = floor_of({10: 1.01}, dtype="float32", steps=STEPS)
    assert judge(changed(10, loss=1.02), floor=in_float32).verdict == AGREE
    assert compare([make(dtype=None), make("b", dtype=None)], floor=floor).verdict == AGREE


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"batch_hash": "x"}, "other data"),
        ({"supervised_tokens": 1}, "other data"),
        ({"lr": 1.0}, "one schedule"),
        ({"loss": math.nan}, "finite"),
    ],
)
def test_runs_that_are_not_alike_measure_no_noise(change: dict[str, Any], said: str) -> None:
    ours, theirs = noisy("a", {}), noisy("b", {7: 1.01})
    theirs = replace(theirs, steps={**theirs.steps, 9: replace(theirs.steps[9], **change)})
    with pytest.raises(DataError, match=said):
        measure_noise([ours, theirs])


def test_equal_runs_or_unlike_dtypes_measure_no_noise() -> None:
    with pytest.raises(DataError, match="equal to the last bit"):
        floor_of({})
    with pytest.raises(DataError, match="float32"):
        measure_noise([noisy("a", {}), noisy("b", {3: 1.01}, dtype="float32")])
    with pytest.raises(DataError, match="unknown dtype"):
        measure_noise([make(dtype=None), make("b", dtype=None)])
    with pytest.raises(DataError, match="two or more"):
        measure_noise([make()])


def test_a_floor_comes_back_from_its_file(tmp_path: Path) -> None:
    floor = floor_of({10: 1.002, 30: 1.0001}, {3: 0.99})
    path = tmp_path / "floor.json"
    path.write_text(json.dumps(floor.to_dict(), allow_nan=False))
    assert read_floor(path) == floor


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        '{"kind": "other"}',
        '{"kind": "torchprime noise floor", "dtype": "bfloat16"}',
    ],
)
def test_what_is_no_floor_is_refused(content: str, tmp_path: Path) -> None:
    path = tmp_path / "floor.json"
    path.write_text(content)
    with pytest.raises(DataError, match="--measure-noise"):
        read_floor(path)
    with pytest.raises(DataError, match="No such file"):
        read_floor(tmp_path / "nothing.json")


@pytest.mark.parametrize("spread", ["NaN", "-1.0", "Infinity"])
def test_a_floor_with_impossible_spreads_is_refused(spread: str, tmp_path: Path) -> None:
    content = json.dumps(floor_of({10: 1.002}).to_dict())
    start = content.index('"11": 0.0')
    path = tmp_path / "floor.json"
    path.write_text(content[:start] + f'"11": {spread}' + content[start + len('"11": 0.0') :])
    with pytest.raises(DataError, match="no number"):
        read_floor(path)


def test_running_max() -> None:
    assert running_max([1, 5, 2, 0, 0, 3], 3) == [5, 5, 5, 2, 3, 3]
    assert running_max([4.0], 11) == [4.0]


# Arguments ----------------------------------------------------------------------------------------


def test_arguments_out_of_range_are_refused() -> None:
    for options in ({"steps": 0}, {"loss_tolerance": -1.0}, {"loss_tolerance": math.nan}):
        with pytest.raises(ConfigError):
            judge(make("b"), **options)
    with pytest.raises(ConfigError, match="two or more"):
        compare([make()])


def test_parity_json_says_all_of_it() -> None:
    told = json.loads(json.dumps(judge(changed(57, loss=1.0002)).to_dict(), allow_nan=False))
    assert told["verdict"] == "differ" and told["reference"] == "a"
    pair = told["pairs"][0]
    assert pair["run"] == "b" and pair["data"]["steps_with_hashes"] == 60
    assert pair["first_beyond"]["quantity"] == "loss" and pair["first_beyond"]["step"] == 57
    assert pair["first_beyond"]["band"] == 1e-4
    assert pair["quantities"]["lr"]["worst"]["relative"] == 0
    assert told["tolerances"]["grad_norm"] == {"relative": 1e-3, "from": "fixed for float32"}
    assert told["runs"][1] | {"path": "", "versions": 0} == {
        "label": "b", "path": "", "source": "metrics.jsonl", "steps": 60, "first_step": 1,
        "last_step": 60, "dtype": "float32", "backend": None, "device": None, "mesh": None,
        "versions": 0, "supervised_tokens_per_s": 2000.0, "notes": [],
    }  # fmt: skip
