"""PEFT's folders as we read them, and one message for every folder that does not fit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from torchprime.checkpoint.adapter.read import read_adapter
from torchprime.errors import CheckpointError


def config_of(base: Path, **changes: Any) -> dict[str, Any]:
    return {**json.loads((base / "config.json").read_text()), **changes}


def test_what_peft_wrote_is_read(each: Any) -> None:
    stored = read_adapter(each.folder)
    parts = stored.fit(config_of(each.base))
    assert set(parts.shapes) == set(stored.tensors)
    assert stored.base == str(each.base)
    assert (stored.spec.rank, stored.spec.scale) == (each.spec.rank, each.spec.scale)
    theirs = {n.removeprefix("base_model.model."): t for n, t in each.tensors.items()}
    # PEFT also lists the output projection that follows the embedding; it saves it once.
    assert all(torch.equal(theirs[name], tensor) for name, tensor in stored.tensors.items())


def test_no_folder_of_peft(tmp_path: Path, make_base: Callable[..., Path]) -> None:
    with pytest.raises(CheckpointError, match=r"no PEFT folder: it has no adapter_config.json"):
        read_adapter(make_base())
    with pytest.raises(CheckpointError, match="There is no local folder"):
        read_adapter(tmp_path / "none")
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.bin").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"only adapter_model.bin and no adapter_model.safe"):
        read_adapter(tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="peft_type: given None"):
        read_adapter(tmp_path)
    run = tmp_path / "run"
    (run / "export").mkdir(parents=True)
    (run / "export" / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=f"Did you mean {run}/export"):
        read_adapter(run)


def test_another_method_is_refused(changed_folder: Callable[..., Path]) -> None:
    folder = changed_folder(peft_type="IA3")
    with pytest.raises(CheckpointError, match="peft_type: given 'IA3'") as error:
        read_adapter(folder)
    assert str(folder) in str(error.value)


def test_another_base_is_named(
    changed_folder: Callable[..., Path], make_base: Callable[..., Path], by_peft
) -> None:
    stored, own = read_adapter(changed_folder()), by_peft("lora").base
    fits = make_base(seed=1)  # of the same shapes
    stored.fit(config_of(fits))
    assert stored.base_note(str(own)) is None
    note = stored.base_note(str(fits))
    assert note is not None and str(fits) in note and str(own) in note
    with pytest.raises(CheckpointError) as error:
        stored.fit(config_of(make_base(hidden=32)))
    told = str(error.value)
    assert "q_proj.lora_A.weight is [4, 64], in the model [4, 32]" in told
    assert str(own) in told
    shallow = config_of(own, num_hidden_layers=1)
    with pytest.raises(CheckpointError, match=r"not known: model.layers.1"):
        stored.fit(shallow)
    with pytest.raises(CheckpointError, match=r"missing: model.layers.2"):
        stored.fit(config_of(own, num_hidden_layers=3))


def test_a_layer_that_the_model_lacks(changed_folder: Callable[..., Path], by_peft) -> None:
    stored = read_adapter(changed_folder(target_modules=["c_attn"]))
    with pytest.raises(CheckpointError, match=r"no adapter for this model.*'c_attn', which match"):
        stored.fit(config_of(by_peft("lora").base))


def test_an_embedding_that_was_untied_is_refused(
    changed_folder: Callable[..., Path], by_peft
) -> None:
    stored = read_adapter(changed_folder("tied embedding", ensure_weight_tying=False))
    with pytest.raises(CheckpointError, match="ensure_weight_tying: given False, expected True"):
        stored.fit(config_of(by_peft("tied embedding").base))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.full((4, 64), torch.nan), "holds NaN or infinite values"),
        (torch.full((4, 64), torch.inf), "holds NaN or infinite values"),
        (torch.zeros(4, 64, dtype=torch.int32), "has the type torch.int32"),
        (None, "missing"),
    ],
)
def test_wrong_tensors_are_named(
    value: torch.Tensor | None, message: str, changed_folder: Callable[..., Path], by_peft
) -> None:
    folder = changed_folder()
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    name = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
    tensors = {n: t for n, t in tensors.items() if n != name or value is not None}
    if value is not None:
        tensors[name] = value
    path.unlink()
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=message) as error:
        read_adapter(folder).fit(config_of(by_peft("lora").base))
    assert name.removeprefix("base_model.model.") in str(error.value)


def test_a_file_that_was_cut_short(changed_folder: Callable[..., Path]) -> None:
    folder = changed_folder()
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="is not a whole safetensors file"):
        read_adapter(folder)
