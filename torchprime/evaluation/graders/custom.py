"""A user's own grader: a Python function given by its dotted path.

It receives a Sample and returns True or False, a number, or None if it does not apply. Any other
result or an exception stops the run with the row's name, because a grade made up from an error
would be misleading.
"""

from __future__ import annotations

import importlib
import inspect
import math
import numbers
import reprlib
import traceback
from collections.abc import Callable
from typing import Any

import numpy as np

from torchprime.config.checks import refuse
from torchprime.errors import DataError
from torchprime.evaluation.graders.samples import Grader, Sample


def python_grader(key: str, path: str) -> Grader:
    """Return a grader that calls the function: True is 1, False is 0, a number itself, None not
    counted.

    Args:
        path: `package.module:function` or `package.module.function`.

    Raises:
        DataError: (when grading) the function raises or returns something else.
    """
    function = _resolve(path, f"{key}.path")

    def grade(sample: Sample) -> float | None:
        try:
            value = function(sample)
        except (Exception, SystemExit) as error:
            raise DataError(_message(key, path, sample, f"it raised {_told(error)}")) from error
        if value is None:
            return None
        grade = _finite(value)
        if grade is None:
            raise DataError(_message(key, path, sample, f"it returned {reprlib.repr(value)}"))
        return grade

    return grade


def _finite(value: Any) -> float | None:
    """Return a truth value or a number of Python or numpy as a float; None for anything else."""
    if not isinstance(value, bool | np.bool_ | numbers.Real):
        return None
    try:
        grade = float(value)
    except OverflowError:  # an integer of hundreds of digits
        return None
    return grade if math.isfinite(grade) else None


def _message(key: str, path: str, sample: Sample, what: str) -> str:
    return (
        f"{key}.path: {path} graded row {sample.row_id}, and {what}; expected True or False, a "
        f"finite number, or None where it does not apply. Correct the function."
    )


def _told(error: BaseException) -> str:
    """Return the exception with the place where it was raised."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({last.filename}:{last.lineno})"


def _resolve(path: str, key: str) -> Callable[[Sample], Any]:
    module_name, _, name = path.partition(":") if ":" in path else path.rpartition(".")
    if not all(part.isidentifier() for part in [*module_name.split("."), *name.split(".")]):
        refuse(
            key,
            path,
            "package.module:function",
            "For def grade(sample) in graders.py write graders:grade.",
        )
    found = _imported(module_name, path, key)
    for part in name.split("."):
        if not hasattr(found, part):
            where = getattr(found, "__file__", None) or module_name
            lacking = f"a function of {module_name}, but it has no {part}"
            refuse(key, path, lacking, f"Correct the name, or define it in {where}.")
        found = getattr(found, part)
    if not callable(found):
        refuse(key, path, f"a function, but it is {found!r}", "Name a function of one Sample.")
    if not _takes_one(found):
        refuse(
            key,
            path,
            f"a function of one Sample, but its arguments are {inspect.signature(found)}",
            "Leave it one argument without a default.",
        )
    return found


def _imported(module: str, path: str, key: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        refuse(
            key,
            path,
            f"a function of a module, but there is no module {error.name}",
            "Correct the name, install it, or put the folder that holds it on PYTHONPATH "
            "(PYTHONPATH=. for this one). Write a class's member after a colon.",
        )
    except (Exception, SystemExit) as error:
        refuse(
            key,
            path,
            f"a function of a module, but importing {module} raised {_told(error)}",
            "Correct the module.",
        )


def _takes_one(function: Callable[..., Any]) -> bool:
    try:
        inspect.signature(function).bind(None)
    except TypeError:
        return False
    except ValueError:  # some builtins have no signature
        return True
    return True
