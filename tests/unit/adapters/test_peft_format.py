"""PEFT's folder format: what we write PEFT reads, what it writes we read, the rest is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from in_peft import lora_config
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from torchprime.adapters.apply import apply_adapter, trainable
from torchprime.adapters.peft_format import (
    CONFIG_NAME,
    KNOWN,
    WEIGHTS_NAME,
    by_tensors,
    config_of,
    file_name,
    model_tensors,
    spec_of,
)
from torchprime.adapters.spec import AdapterSpec
from torchprime.adapters.targets import target_names, trained_modules
from torchprime.errors import CheckpointError
from torchprime.models.decoder import CausalLM

SPECS = {
    "lora": AdapterSpec(rank=4, alpha=8, targets=("q_proj", "o_proj")),
    "dora": AdapterSpec(rank=4, alpha=8, dora=True, scaling="rslora"),
    "parts": AdapterSpec(rank=2, alpha=2, layers=(1,), modules_to_train=("norm", "embed_tokens")),
}


@pytest.mark.parametrize("name", SPECS)
def test_peft_loads_what_we_write(
    name: str, ours: CausalLM, make_theirs: Callable[[], PreTrainedModel], tmp_path: Path
) -> None:
    spec = SPECS[name]
    whole = trained_modules(ours, spec.modules_to_train)
    targets = apply_adapter(ours, spec)
    tensors = {n: torch.randn_like(p) for n, p in trainable(ours).items()}
    save_file({file_name(n): t for n, t in tensors.items()}, tmp_path / WEIGHTS_NAME)
    config = config_of(spec, base="some/base", targets=targets, whole=whole)
    (tmp_path / CONFIG_NAME).write_text(json.dumps(config))
    loaded = peft.PeftModel.from_pretrained(make_theirs(), str(tmp_path))
    theirs = peft.get_peft_model_state_dict(loaded)
    assert set(theirs) == {file_name(name) for name in tensors}
    assert all(torch.equal(theirs[file_name(n)], t) for n, t in tensors.items())
    scales = [m.scaling["default"] for m in loaded.modules() if isinstance(m, LoraLayer)]
    assert set(scales) == {spec.scale} and spec_of(config, "x").scale == spec.scale


@pytest.mark.parametrize("name", SPECS)
def test_we_read_what_peft_writes(
    name: str, ours: CausalLM, make_theirs: Callable[[], PreTrainedModel], tmp_path: Path
) -> None:
    spec = SPECS[name]
    targets = spec.targets if spec.targets != ("all-linear",) else ("q_proj", "up_proj")
    config = lora_config(replace(spec, targets=targets))
    peft.get_peft_model(make_theirs(), config).save_pretrained(str(tmp_path))
    read = spec_of(json.loads((tmp_path / CONFIG_NAME).read_text()), "folder")
    assert read.rank == spec.rank and read.scale == spec.scale and read.dora == spec.dora
    expected = target_names(ours, AdapterSpec(1, 1, targets=targets, layers=spec.layers))
    assert apply_adapter(ours, read) == expected
    tensors = model_tensors(load_file(tmp_path / WEIGHTS_NAME), "folder")
    shapes = {name: p.shape for name, p in trainable(ours).items()}
    assert {name: t.shape for name, t in tensors.items()} == shapes


GOOD = config_of(
    AdapterSpec(rank=4, alpha=8), base="b", targets=["model.layers.0.mlp.up_proj"], whole=[]
)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type: given 'IA3'"),
        ({"peft_type": None}, "peft_type: given None"),
        ({"r": 0}, "r: given 0, expected a whole number above 0"),
        ({"r": "8"}, "r: given '8'"),
        ({"r": 2.5}, "r: given 2.5"),
        ({"lora_alpha": "x"}, "lora_alpha: given 'x'"),
        ({"lora_dropout": -1}, "lora_dropout: given -1"),
        ({"lora_dropout": 1.5}, "lora_dropout: given 1.5, expected a number from 0 to below 1"),
        ({"use_dora": "yes"}, "use_dora: given 'yes', expected true or false"),
        ({"target_modules": ".*q_proj"}, "target_modules: given '.*q_proj', expected a list"),
        ({"target_modules": [3]}, "target_modules: given [3]"),
        ({"modules_to_save": "lm_head"}, "modules_to_save: given 'lm_head'"),
        ({"layers_to_transform": [-1]}, "layers_to_transform: given [-1]"),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern: given {'q_proj': 8}"),
        ({"bias": "all"}, "bias: given 'all', expected 'none'"),
        ({"lora_bias": True}, "lora_bias: given True"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights: given 'pissa'"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"a_new_method": 3}, "a_new_method: given 3"),
    ],
)
def test_what_we_do_not_have_is_refused_by_name(changed: dict[str, Any], message: str) -> None:
    spec_of(GOOD, "folder")
    with pytest.raises(CheckpointError) as error:
        spec_of({**GOOD, **changed}, "folder")
    assert message in str(error.value) and "folder" in str(error.value)


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (AdapterSpec(1, 1), (7, None)),
        (AdapterSpec(1, 1, layers=(1,)), (7, [1])),
        (AdapterSpec(1, 1, targets=("q_proj", "up_proj")), (2, None)),
        (AdapterSpec(1, 1, targets=("model.layers.1.*.q_proj",)), (1, [1])),
        (AdapterSpec(1, 1, targets=("model.layers.1.*.q_proj", "*.0.mlp.up_proj")), (2, None)),
    ],
)
def test_no_other_layer_is_selected(
    spec: AdapterSpec,
    expected: tuple[int, list[int] | None],
    ours: CausalLM,
    make_theirs: Callable[[], PreTrainedModel],
) -> None:
    """PEFT takes the end of a name in every layer: full names where that would be too many."""
    targets = apply_adapter(ours, spec)
    config = config_of(spec, base="b", targets=targets, whole=[])
    assert (len(config["target_modules"]), config["layers_to_transform"]) == expected
    kept = {key: config[key] for key in ("target_modules", "layers_to_transform")}
    theirs = peft.get_peft_model(make_theirs(), peft.LoraConfig(**kept))
    adapted = {
        n.removeprefix("base_model.model.")
        for n, m in theirs.named_modules()
        if isinstance(m, LoraLayer)
    }
    assert adapted == set(targets)


@pytest.mark.parametrize("pattern", [r".*\.layers\.1\..*(q_proj|up_proj)", r".*\.1\.mlp\.up_proj"])
def test_a_pattern_is_read_by_its_tensors(
    pattern: str, ours: CausalLM, make_theirs: Callable[[], PreTrainedModel], tmp_path: Path
) -> None:
    given = peft.LoraConfig(r=2, target_modules=pattern, modules_to_save=["model.norm"])
    theirs = peft.get_peft_model(make_theirs(), given)
    theirs.save_pretrained(str(tmp_path))
    config = json.loads((tmp_path / CONFIG_NAME).read_text())
    names = model_tensors(load_file(tmp_path / WEIGHTS_NAME), "folder")
    spec = spec_of(by_tensors(config, names), "folder")
    assert trained_modules(ours, spec.modules_to_train) == ["model.norm"]
    adapted = {
        n.removeprefix("base_model.model.")
        for n, m in theirs.named_modules()
        if isinstance(m, LoraLayer)
    }
    assert set(apply_adapter(ours, spec)) == adapted
    assert by_tensors(config, []) == config


def test_every_setting_of_peft_is_known() -> None:
    """A setting that a new release adds is looked at before it is ignored."""
    assert set(peft.LoraConfig().to_dict()) <= KNOWN


def test_tensors_without_the_prefix_are_refused() -> None:
    with pytest.raises(CheckpointError, match=r"folder: .*'lora_A.weight'.*base_model"):
        model_tensors({"lora_A.weight": torch.zeros(1)}, "folder")
