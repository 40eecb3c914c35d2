"""Differences between an export and its base, against whole tensors in plain torch."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from torchprime.checkpoint.hf.read import SafetensorsReader
from torchprime.checkpoint.proof import base_changes
from torchprime.checkpoint.proof.base_changes import changes_from, told_changes
from torchprime.errors import CheckpointError

EMBEDDING, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"


@pytest.fixture
def reader(tmp_path: Path):
    """Return a function that writes tensors to a folder and reads it."""

    def make(**tensors: torch.Tensor) -> SafetensorsReader:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        names = {"embedding": EMBEDDING, "head": HEAD, "norm": NORM}
        save_file({names[k]: v.clone() for k, v in tensors.items()}, folder / "model.safetensors")
        return SafetensorsReader(folder)

    return make


def rows(count: int = 6, width: int = 4) -> torch.Tensor:
    return torch.arange(float(count * width)).reshape(count, width) / 7


def test_the_largest_change_is_found_in_any_piece(reader, monkeypatch) -> None:
    monkeypatch.setattr(base_changes, "PIECE", 5)  # tensors of 24 values are cut
    for row, column in ((0, 0), (3, 1), (5, 3)):
        new = rows()
        new[row, column] -= 0.5
        found = changes_from(
            reader(embedding=rows(), head=rows(), norm=torch.ones(4)),
            reader(embedding=rows(), head=new, norm=torch.ones(4)),
        )
        assert found == {
            "tensors": 3,
            "changed": 1,
            "largest_change": pytest.approx((new - rows()).abs().max().item()),
            "largest_change_in": HEAD,
        }


def test_the_base_is_rounded_like_the_export(reader) -> None:
    base, export = rows(), rows().bfloat16()
    assert not torch.equal(export.float(), base)
    found = changes_from(reader(embedding=base, head=base), reader(embedding=export, head=export))
    assert found["changed"] == 0 and found["largest_change_in"] is None


def test_new_and_unused_rows_are_counted_and_not_compared(reader, monkeypatch) -> None:
    monkeypatch.setattr(base_changes, "PIECE", 5)
    grown = torch.cat([rows(), torch.full((2, 4), 9.0)])
    grown[4] += 100  # a row that the base did not use
    base = reader(embedding=rows(), head=rows())
    found = changes_from(base, reader(embedding=grown, head=grown), [4])
    assert found == {
        **{"tensors": 2, "changed": 0, "largest_change": 0.0, "largest_change_in": None},
        **{"new_rows": 2 * (2 + 1), "unused_rows": [4]},
    }
    assert told_changes({**found, "largest_change_in": NORM}).endswith(
        "; 6 rows are new and not compared"
    )


def test_a_tied_export_is_compared_with_the_bases_only_tensor(reader) -> None:
    tied = reader(embedding=rows() + 1)
    found = changes_from(reader(embedding=rows(), head=rows()), tied)
    assert (found["tensors"], found["changed"]) == (1, 1)


def test_a_nan_is_an_infinite_change_in_json(reader) -> None:
    broken = rows()
    broken[2, 2] = math.nan
    found = changes_from(
        reader(embedding=rows(), head=rows()), reader(embedding=rows(), head=broken)
    )
    assert found["largest_change"] == "inf" and found["largest_change_in"] == HEAD
    assert "the largest change is inf in lm_head.weight" in told_changes(found)


@pytest.mark.parametrize(
    ("base", "export", "said"),
    [
        ({"embedding": rows()}, {"embedding": rows(), "head": rows()}, "the base does not have it"),
        ({"embedding": rows()}, {"embedding": rows(5)}, r"\[5, 4\] .* the base has it as \[6, 4\]"),
        ({"embedding": rows()}, {"embedding": rows(6, 5)}, "the base has it as"),
        (
            {"embedding": rows(), "norm": torch.ones(4)},
            {"embedding": rows(), "norm": torch.ones(5)},
            "norm.weight is",
        ),
    ],
)
def test_tensors_of_other_shapes_are_refused(reader, base, export, said: str) -> None:
    with pytest.raises(CheckpointError, match=said):
        changes_from(reader(**base), reader(**export))
