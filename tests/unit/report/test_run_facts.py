"""Facts of run.json in a report: read from a run of version 0.1.0, refused if incomplete."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from torchprime.report.run_facts import RunFacts

WRITTEN = Path(__file__).parents[2] / "assets" / "run_0_1" / "run" / "run.json"


@pytest.fixture
def content() -> dict[str, Any]:
    return json.loads(WRITTEN.read_text())


def test_every_part_is_the_files(content: dict[str, Any]) -> None:
    facts = RunFacts.from_dict(content)
    assert facts.total_steps == content["plan"]["total_steps"]
    assert facts.starts == (0,)
    assert (facts.device_kind, facts.device_count) == tuple(content["device"].values())
    assert facts.mesh == content["mesh"] and facts.versions == content["versions"]
    assert facts.fingerprints["data"] == content["fingerprints"]["data"]
    assert facts.rows()["command"] == content["command"]
    assert f"{content['model']['parameters']:,} parameters" in facts.rows()["model"]


def test_an_adapters_parameters_are_counted(content: dict[str, Any]) -> None:
    assert "adapter" not in RunFacts.from_dict(content).rows()["model"]
    content["plan"] |= {"parameters": 1100, "trained_parameters": 1100}
    assert "adapter" not in RunFacts.from_dict(content).rows()["model"]
    content["plan"]["trained_parameters"] = 100
    assert RunFacts.from_dict(content).rows()["model"].endswith("an adapter trained 100")


def test_a_fingerprint_that_the_run_has_not_is_left_out(content: dict[str, Any]) -> None:
    content["fingerprints"] |= {"eval": None, "template": None}
    assert not {"eval", "template"} & RunFacts.from_dict(content).fingerprints.keys()


def test_only_axes_with_several_devices_are_named(content: dict[str, Any]) -> None:
    content["device"] = {"kind": "chip", "count": 8}
    content["mesh"] = {"data": 1, "fsdp": 2, "tensor": 4}
    assert RunFacts.from_dict(content).used_mesh == "8 x chip: fsdp 2 x tensor 4"
    content["mesh"] = {"data": 1}
    assert RunFacts.from_dict(content).used_mesh == "8 x chip"


@pytest.mark.parametrize("missing", ["plan", "starts", "device", "mesh", "model", "command"])
def test_a_missing_part_is_named(content: dict[str, Any], missing: str) -> None:
    del content[missing]
    with pytest.raises(KeyError, match=missing):
        RunFacts.from_dict(content)


def test_the_programs_of_each_kind_of_step(content: dict[str, Any]) -> None:
    assert "compiled" not in RunFacts.from_dict(content).rows()
    content["compiled"] = {
        "train step": {"programs": 1, "seconds": 4.25},
        "held-out step": {"programs": 2, "seconds": 1.5},
    }
    assert RunFacts.from_dict(content).rows()["compiled"] == (
        "in 5.8 s, first runs included: train step 1 program 4.2 s, held-out step 2 programs 1.5 s"
    )
