"""Names of other trainers lead to keys that exist."""

from __future__ import annotations

import re

import pytest

from torchprime.config.load import known_keys
from torchprime.config.other_names import ADVICE, SAME, advice_for


def test_every_key_that_is_advised_exists() -> None:
    keys = known_keys()
    text = " ".join([*SAME.values(), *ADVICE.values()])
    named = set(
        re.findall(
            r"\b(?:task|dataset|model|eval|selection|resume|checkpoint|export)\.[a-z_.]+", text
        )
    )
    assert len(named) > 15
    assert {name.rstrip(".") for name in named} - set(keys) == set()
    assert not SAME.keys() & ADVICE.keys()


@pytest.mark.parametrize("key", ["cutoff_len", "task.cutoff_len", "a.b.cutoff_len"])
def test_the_last_part_of_a_key_decides(key: str) -> None:
    assert advice_for(key) == "Here it is dataset.block_size."


def test_an_unknown_name_has_no_advice() -> None:
    assert advice_for("cutoff_len.x") is None and advice_for("") is None
    assert advice_for("bf16") == ADVICE["bf16"]
