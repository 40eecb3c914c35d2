"""A user's own function: found by its path, and held to what a grade is."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from torchprime.errors import DataError
from torchprime.evaluation.graders.make import Sample, make_grader

Make = Callable[..., Sample]
Refused = Callable[..., str]

MODULE = '''
"""Graders of a user."""
VALUE = 3
result = None

def words(sample):
    return len(sample.output.split())

def given(sample, scale=1):
    return result

def broken(sample):
    return 1 / sample.missing

def leaves(sample):
    raise SystemExit(3)

def two(sample, other):
    return 1

def none():
    return 1

class Outer:
    @staticmethod
    def inner(sample):
        return 0.25

class Tuned:
    def __call__(self, sample):
        return 0.75

tuned = Tuned()
'''


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """`own_graders.words` can be imported; so can `own_graders.more`."""
    package = tmp_path / "own_graders"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "more.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield package
    for name in [name for name in sys.modules if name.split(".")[0] == "own_graders"]:
        del sys.modules[name]


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("own_graders.more:words", 3.0),
        ("own_graders.more.words", 3.0),
        ("own_graders.more:Outer.inner", 0.25),
        ("own_graders.more:tuned", 0.75),
    ],
)
def test_a_function_is_found(module: Path, sample: Make, path: str, expected: float) -> None:
    graded = make_grader("python", path=path)(sample("one two three"))
    assert (type(graded), graded) == (float, expected)


@pytest.mark.parametrize(
    ("returned", "expected"),
    [
        (True, 1.0),
        (False, 0.0),
        (3, 3.0),
        (-0.5, -0.5),
        (None, None),
        (np.float32(0.5), 0.5),
        (np.int64(2), 2.0),
        (np.True_, 1.0),
        (Fraction(1, 4), 0.25),
    ],
)
def test_what_it_returns_is_the_grade(
    module: Path, sample: Make, returned: Any, expected: float | None
) -> None:
    grader = make_grader("python", path="own_graders.more:given")
    sys.modules["own_graders.more"].__dict__["result"] = returned
    graded = grader(sample("a"))
    assert graded == expected
    assert type(graded) is type(expected)


@pytest.mark.parametrize(
    "returned",
    ["1", float("nan"), float("inf"), np.float64("nan"), [1.0], {}, 1j, torch.tensor(1.0),
     10**400, np.array([1.0])],
)  # fmt: skip
def test_anything_else_names_grader_row_and_value(
    module: Path, sample: Make, returned: Any
) -> None:
    grader = make_grader("python", key="eval.graders[1]", path="own_graders.more:given")
    sys.modules["own_graders.more"].__dict__["result"] = returned
    with pytest.raises(DataError) as error:
        grader(sample("a"))
    message = str(error.value)
    assert message.startswith(
        "eval.graders[1].path: own_graders.more:given graded row rows.jsonl:7, and it returned "
    )
    assert repr(returned)[:8] in message
    assert message.endswith(
        "; expected True or False, a finite number, or None where it does not apply. "
        "Correct the function."
    )
    assert len(message) < 400


@pytest.mark.parametrize(
    ("name", "raised", "line"),
    [
        ("broken", "AttributeError: 'Sample' object has no attribute 'missing'", 13),
        ("leaves", "SystemExit: 3", 16),
    ],
)
def test_what_it_raises_names_grader_row_and_line(
    module: Path, sample: Make, name: str, raised: str, line: int
) -> None:
    grader = make_grader("python", key="eval.graders[1]", path=f"own_graders.more:{name}")
    with pytest.raises(DataError) as error:
        grader(sample("a"))
    assert str(error.value).startswith(
        f"eval.graders[1].path: own_graders.more:{name} graded row rows.jsonl:7, and it raised "
        f"{raised} ({module / 'more.py'}:{line}); expected True or False"
    )


@pytest.mark.parametrize(
    ("path", "expected", "fix"),
    [
        ("words", "package.module:function", "write graders:grade"),
        ("./graders.py:words", "package.module:function", "write graders:grade"),
        ("own_graders.more:", "package.module:function", "write graders:grade"),
        ("own_graders.les:words", "there is no module own_graders.les", "PYTHONPATH=."),
        ("own_grader.words", "there is no module own_grader", "PYTHONPATH=."),
        ("own_graders.more:word", "own_graders.more, but it has no word", "more.py"),
        ("own_graders.more.Outer.inner", "no module own_graders.more.Outer", "after a colon"),
        ("own_graders.more:VALUE", "a function, but it is 3", "Name a function of one Sample"),
        ("own_graders.more:two", "its arguments are (sample, other)", "one argument"),
        ("own_graders.more:none", "its arguments are ()", "one argument"),
    ],
)
def test_a_path_that_leads_to_no_function(
    module: Path, refused: Refused, path: str, expected: str, fix: str
) -> None:
    message = refused("python", path=path)
    assert message.startswith(f"eval.graders[1].path: given {path!r}, expected ")
    assert expected in message and fix in message


@pytest.mark.parametrize(
    ("text", "raised"),
    [
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("def (", "SyntaxError: invalid syntax"),
        ("raise SystemExit(1)", "SystemExit: 1"),
        ("import no_such_library", "no module no_such_library"),
    ],
)
def test_a_module_that_cannot_be_imported(
    module: Path, refused: Refused, text: str, raised: str
) -> None:
    (module / "bad.py").write_text(text)
    message = refused("python", path="own_graders.bad:grade")
    assert message.startswith("eval.graders[1].path: given 'own_graders.bad:grade', expected a fun")
    assert raised in message
    assert "Correct the" in message
