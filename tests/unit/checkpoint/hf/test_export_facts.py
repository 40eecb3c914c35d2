"""The facts in a checkpoint's hf/export.json: written, read, and refused if damaged."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from torchprime.adapters.spec import AdapterSpec
from torchprime.checkpoint.hf.card import CardFacts
from torchprime.checkpoint.hf.export_facts import FACTS, ExportFacts, read_facts
from torchprime.errors import CheckpointError
from torchprime.files.atomic import write_json

GOOD = asdict(AdapterSpec(rank=2, alpha=1))


@pytest.fixture
def facts() -> ExportFacts:
    return ExportFacts(
        spec={"b": (2, 3), "a": (2,)},
        dtype=torch.bfloat16,
        max_shard_bytes=30_000,
        stop_ids=(0, 5),
        template="0" * 64,
        base_model="some/model",
        unused_rows=(7,),
        step=7,
        card=CardFacts(name="tuned", hub_datasets=("a/b",), versions={"torch": "2"}, chat=True),
        metrics={"train loss of the last step": 1.25},
        fingerprints={"data": "d" * 64, "heldout": None},
        adapter=AdapterSpec(rank=2, alpha=0.5, layers=(0, 3), modules_to_train=("norm",)),
        base_sha256="e" * 64,
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}", "format None"),
        ('{"format_version": 9}', "format 9"),
        ('{"format_version": 1, "dtype": "float32"}', "does not hold an export's facts"),
        ("[", "cannot be read as JSON"),
    ],
)
def test_facts_that_cannot_be_read(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / FACTS).write_text(content)
    with pytest.raises(CheckpointError, match=message):
        read_facts(tmp_path / FACTS)


def test_facts_survive_being_written(tmp_path: Path, facts: ExportFacts) -> None:
    write_json(tmp_path / FACTS, facts.to_dict())
    found = read_facts(tmp_path / FACTS)
    assert found == facts
    assert list(found.spec) == list(facts.spec)  # the order of the files


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"card": "x"}, r"card: given 'x', expected an object"),
        ({"card": {"hub_model": ["a/b"]}}, "card.hub_model: given list, expected text, or null"),
        ({"dtype": "complex64"}, "dtype: given 'complex64', expected a type of weights"),
        ({"adapter": {}}, "adapter lacks rank"),
        ({"adapter": {"rank": 2, "more": 1}}, "adapter"),
        (
            {"adapter": {**GOOD, "base_type": "int3"}},
            "adapter.base_type: given 'int3', expected run",
        ),
        ({"adapter": {**GOOD, "layers": [-1]}}, "adapter.layers"),
        ({"parts": ["all"]}, "parts: given list, expected text or all"),
        ({"max_shard_bytes": 0}, "max_shard_bytes: given 0, expected a whole number from 1"),
    ],
)
def test_a_fact_of_another_type_is_refused_by_name(
    tmp_path: Path, facts: ExportFacts, change: dict[str, Any], message: str
) -> None:
    (tmp_path / FACTS).write_text(json.dumps({**facts.to_dict(), **change}))
    with pytest.raises(CheckpointError, match=message):
        read_facts(tmp_path / FACTS)


def test_facts_of_an_older_version_have_fewer_fields(tmp_path: Path, facts: ExportFacts) -> None:
    content = facts.to_dict()
    content["card"] = {"name": "tuned"}
    del content["template_options"], content["unused_rows"], content["parts"]
    (tmp_path / FACTS).write_text(json.dumps(content))
    found = read_facts(tmp_path / FACTS)
    assert found.card == CardFacts(name="tuned")
    assert (found.template_options, found.unused_rows, found.parts) == ({}, (), "text")
