"""A base with its adapter in transformers, against PEFT's logits."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from torchprime.checkpoint.adapter.load import load_model, resolve_model
from torchprime.errors import CheckpointError


def test_an_adapter_is_loaded_with_its_base(each: Any, ids: Tensor) -> None:
    model = load_model(resolve_model(str(each.folder)))
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    assert (logits - each.logits).abs().max() <= 1e-5 * each.logits.abs().max()


def test_a_model_is_loaded_as_it_is(make_base: Callable[..., Path], ids: Tensor) -> None:
    folder = resolve_model(str(make_base()))
    assert folder == make_base().resolve()
    assert load_model(folder)(input_ids=ids).logits.shape == (2, 24, 320)


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ("/no/such/base", r"/no/such/base.*the base of the adapter .*--merge --out NEW"),
        (None, "adapter_config.json names no base"),
    ],
)
def test_a_base_that_is_not_here(
    base: str | None, message: str, changed_folder: Callable[..., Path]
) -> None:
    with pytest.raises(CheckpointError, match=message):
        load_model(changed_folder(base_model_name_or_path=base))


def test_an_adapter_beside_a_model_is_refused(by_peft, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(by_peft("lora").base, tmp_path / "both"))
    shutil.copy(by_peft("lora").folder / "adapter_config.json", folder)
    assert json.loads((folder / "config.json").read_text())
    with pytest.raises(CheckpointError, match="a model with a PEFT adapter beside it"):
        resolve_model(str(folder))
