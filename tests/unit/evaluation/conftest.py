"""Samples as tests write them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from torchprime.errors import ConfigError
from torchprime.evaluation.graders import Sample, make_grader

KEY = "eval.graders[1]"


def _sample(output: str, reference: str = "", **others: Any) -> Sample:
    values = {"row_id": "rows.jsonl:7", "prompt": "question", "stopped": True, "tokens": 3}
    return Sample(output=output, reference=reference, **{**values, **others})


@pytest.fixture(scope="session")
def sample() -> Callable[..., Sample]:
    """A sample of an output and a reference, that stopped by itself."""
    return _sample


@pytest.fixture(scope="session")
def grade() -> Callable[..., float | None]:
    """One grade: of a kind, for an output and a reference, with the kind's options."""

    def graded(kind: str, output: str, reference: str = "", **options: Any) -> float | None:
        return make_grader(kind, key=KEY, **options)(_sample(output, reference))

    return graded


@pytest.fixture(scope="session")
def refused() -> Callable[..., str]:
    """The message that a grader of this kind and these options is refused with."""

    def message(kind: str, **options: Any) -> str:
        with pytest.raises(ConfigError) as error:
            make_grader(kind, key=KEY, **options)
        return str(error.value)

    return message
