"""Samples as tests write them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from torchprime.errors import ConfigError
from torchprime.evaluation.graders.make import Sample, make_grader

KEY = "eval.graders[1]"


def _sample(output: str, reference: str = "", **others: Any) -> Sample:
    values = {"row_id": "rows.jsonl:7", "prompt": "question", "stopped": True, "tokens": 3}
    return Sample(output=output, reference=reference, **{**values, **others})


@pytest.fixture(scope="session")
def sample() -> Callable[..., Sample]:
    """A sample of an output and a reference, that stopped by itself."""
    return _sample


@dataclass(frozen=True)
class HardPair:
    """Two answers, a person's verdict on them, and why they are hard."""

    reference: str
    answer: str
    right: bool
    why: str


@pytest.fixture(scope="session")
def hard_pairs() -> list[HardPair]:
    """200 pairs of answers that are easily taken for equal, or for different."""
    lines = Path(__file__).with_name("hard_answers.jsonl").read_text(encoding="utf-8").splitlines()
    return [HardPair(**json.loads(line)) for line in lines]


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
