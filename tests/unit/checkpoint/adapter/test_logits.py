"""Logits of base and adapter together against PEFT's."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from torchprime.checkpoint.adapter.logits import adapted_logits
from torchprime.checkpoint.adapter.read import read_adapter
from torchprime.checkpoint.hf.read import SafetensorsReader


def test_logits_are_those_of_peft(each: Any, ids: Tensor) -> None:
    stored, base = read_adapter(each.folder), SafetensorsReader(each.base)
    config = json.loads((each.base / "config.json").read_text())
    found = adapted_logits(
        config, base.get, stored.tensors, stored.spec, torch.float32, ids.numpy()
    )
    largest = each.logits.abs().max()
    assert (torch.as_tensor(found) - each.logits).abs().max() <= 1e-5 * largest


def test_a_quantized_base_changes_them(by_peft, ids: Tensor) -> None:
    made = by_peft("dora")
    stored, base = read_adapter(made.folder), SafetensorsReader(made.base)
    config = json.loads((made.base / "config.json").read_text())
    spec = replace(stored.spec, base_type="nf4")
    found = adapted_logits(config, base.get, stored.tensors, spec, torch.float32, ids.numpy())
    away = (torch.as_tensor(found) - made.logits).abs().max() / made.logits.abs().max()
    assert 1e-3 < away < 0.5
