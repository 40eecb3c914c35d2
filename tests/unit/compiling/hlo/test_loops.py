"""Trips of counted loops in the forms that the TPU's compilers write."""

from __future__ import annotations

import pytest

from torchprime.compiling.hlo.program import Program

# ruff: noqa: E501
LOOP = """HloModule loop, is_scheduled=true

%below (a: s32[], b: s32[]) -> pred[] {{
  %a = s32[] parameter(0)
  %b = s32[] parameter(1)
  ROOT %smaller = pred[] compare(%a, %b), direction=LT
}}

%plus (c: s32[]) -> s32[] {{
  %c = s32[] parameter(0)
  %two = s32[] constant(2)
  ROOT %more = s32[] add(%two, %c)
}}

%body (p: (s32[], s32[], f32[8])) -> (s32[], s32[], f32[8]) {{
  %p = (s32[], s32[], f32[8]{{0}}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %last = s32[] get-tuple-element(%p), index=1
  %x = f32[8]{{0}} get-tuple-element(%p), index=2
  %one = s32[] constant(1)
  %five = s32[] constant(5)
  %backward = s32[] subtract(%five, %i)
  %elsewhere = s32[] add(%i, %five)
  {step}
  ROOT %out = (s32[], s32[], f32[8]{{0}}) tuple(%next, %last, %x)
}}

%condition (q: (s32[], s32[], f32[8])) -> pred[] {{
  %q = (s32[], s32[], f32[8]{{0}}) parameter(0)
  %j = s32[] get-tuple-element(%q), index=0
  %end = s32[] get-tuple-element(%q), index=1
  %six = s32[] constant(6)
  {test}
}}

ENTRY %main (y: f32[8]) -> f32[8] {{
  %y = f32[8]{{0}} parameter(0)
  %first = s32[] constant({first})
  %kept = s32[] copy(%first)
  %seven = s32[] constant(7)
  %start = (s32[], s32[], f32[8]{{0}}) tuple(%kept, %seven, %y)
  %while.1 = (s32[], s32[], f32[8]{{0}}) while(%start), condition=%condition, body=%body
  ROOT %z = f32[8]{{0}} get-tuple-element(%while.1), index=2
}}
"""
STEP = "%next = s32[] add(%i, %one)"
TEST = "ROOT %t = pred[] compare(%j, %six), direction=LT"


def trips(step: str = STEP, test: str = TEST, first: int = 0) -> int:
    (found,) = Program(LOOP.format(step=step, test=test, first=first)).loops
    return found


@pytest.mark.parametrize(
    ("step", "count"),
    [
        (STEP, 6),
        # Through copies, as libtpu 0.0.52 writes them.
        ("%h = s32[] copy(%i)\n  %s = s32[] add(%h, %one)\n  %next = s32[] copy(%s)", 6),
        (
            "%s = s32[] add(%one, %i)\n  %b = (s32[], s32[], u32[]) copy-start(%s)"
            "\n  %next = s32[] copy-done(%b)",
            6,
        ),
        ("%next = s32[] fusion(%i), kind=kLoop, calls=%plus", 3),
        ("%next = s32[] add(%i, %five)", 2),  # 0 and 5
    ],
)
def test_steps(step: str, count: int) -> None:
    assert trips(step) == count


@pytest.mark.parametrize(
    ("test", "count"),
    [
        (TEST, 6),
        ("%k = s32[] copy(%j)\n  ROOT %t = pred[] compare(%k, %six), direction=LT", 6),
        ("ROOT %t = pred[] compare(%six, %j), direction=GT", 6),
        ("ROOT %t = pred[] compare(%j, %six), direction=LE", 7),
        ("ROOT %t = pred[] compare(%j, %six), direction=NE", 6),
        ("ROOT %t = pred[] fusion(%j, %six), kind=kLoop, calls=%below", 6),
        ("ROOT %t = pred[] compare(%j, %end), direction=LT", 7),  # a limit that the loop carries
    ],
)
def test_conditions(test: str, count: int) -> None:
    assert trips(test=test) == count


def test_a_loop_that_does_not_begin_at_zero() -> None:
    assert trips(first=2) == 4


def test_a_loop_that_counts_down() -> None:
    step = "%next = s32[] subtract(%i, %one)"
    test = "%none = s32[] constant(0)\n  ROOT %t = pred[] compare(%j, %none), direction=GT"
    assert trips(step, test, first=5) == 5
