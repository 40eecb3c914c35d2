"""A folder of Fisher information: what it holds, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from torchprime.checkpoint.fisher import FORMULA, MANIFEST, FisherFacts, FisherFolder, write_fisher
from torchprime.checkpoint.hf.write import WeightLayout
from torchprime.errors import CheckpointError

SHAPES = {"model.a": (2, 3), "model.b": (4,)}
FACTS = FisherFacts(base="0" * 64, data="d", examples=3, supervised_weight=7.5)


@pytest.fixture(params=[1000, 20])
def folder(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """In one file, and in several."""
    layout = WeightLayout(SHAPES, torch.float32, request.param)
    values = ((name, torch.full(shape, 0.5)) for name, shape in SHAPES.items())
    write_fisher(tmp_path / "fisher", values, layout, FACTS)
    return tmp_path / "fisher"


def test_it_is_read_as_it_was_written(folder: Path) -> None:
    fisher = FisherFolder(folder)
    assert fisher.facts == FACTS
    fisher.check_shapes(SHAPES)
    fisher.check_values(FACTS.base)
    assert torch.equal(fisher.get("model.a"), torch.full((2, 3), 0.5))
    assert json.loads((folder / MANIFEST).read_text())["formula"] == FORMULA


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("format_version", 2, "has format 2"),
        ("formula", "mean", "the formula 'mean'"),
        ("base", "short", "base: given 'short', expected 64 hexadecimal digits"),
        ("examples", 0, "examples: given 0"),
    ],
)
def test_a_manifest_that_is_not_ours(folder: Path, field: str, value: object, message: str) -> None:
    content = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps({**content, field: value}))
    with pytest.raises(CheckpointError, match=message):
        FisherFolder(folder)


def test_another_model_and_another_base(folder: Path) -> None:
    fisher = FisherFolder(folder)
    with pytest.raises(CheckpointError, match=r"model.b \(model \[5\], file \[4\]\)"):
        fisher.check_shapes({**SHAPES, "model.b": (5,)})
    with pytest.raises(CheckpointError, match=r"model.c \(model \[1\], file none\)"):
        fisher.check_shapes({**SHAPES, "model.c": (1,)})
    with pytest.raises(CheckpointError, match="this run's base has 1111"):
        fisher.check_values("1" * 64)


def test_a_used_folder_is_refused(folder: Path) -> None:
    layout = WeightLayout(SHAPES, torch.float32, 1000)
    with pytest.raises(CheckpointError, match="already holds"):
        write_fisher(folder, iter(()), layout, FACTS)
