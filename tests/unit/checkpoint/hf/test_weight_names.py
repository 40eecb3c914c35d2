"""Names that other programs leave in files: read where the weights are those of a plain model, else
named as what they are."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_families import make_wrapper

from torchprime.checkpoint.hf.read import SafetensorsReader, check_names
from torchprime.checkpoint.hf.source import resolve_pretrained
from torchprime.checkpoint.proof.base_changes import changes_from
from torchprime.errors import CheckpointError
from torchprime.models.architecture import architecture_from_hf
from torchprime.models.decoder import CausalLM

Tensors = dict[str, torch.Tensor]
LAYER = "model.layers.0.mlp.up_proj.weight"


def rewritten(source: Path, folder: Path, change: Callable[[Tensors], Tensors]) -> Path:
    """The source's folder with other tensors."""
    if source != folder:
        shutil.copytree(source, folder, dirs_exist_ok=True)
    tensors = change(load_file(source / "model.safetensors"))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: f"module.{name}",
        lambda name: f"_orig_mod.{name}",
        lambda name: f"module._orig_mod.{name}",
        lambda name: f"base_model.model.{name}",
        lambda name: name.replace("layers.0.", "layers.0._orig_mod."),
        lambda name: "_orig_mod." + name.removeprefix("model."),  # a bare decoder, and its head
    ],
)
def test_wrappers_in_names_are_taken_off(llama, tmp_path, rename: Callable[[str], str]) -> None:
    folder = rewritten(
        llama.folder, tmp_path, lambda tensors: {rename(n): t for n, t in tensors.items()}
    )
    reader = SafetensorsReader(folder)
    check_names(llama.spec, reader, tied=False)
    for name, tensor in llama.reader.weights(llama.spec):
        assert torch.equal(reader.get(name), tensor)


def test_a_wrapper_that_only_some_have_is_no_wrapper(llama, tmp_path) -> None:
    def change(tensors: Tensors) -> Tensors:
        return {f"module.{n}" if n == LAYER else n: t for n, t in tensors.items()}

    reader = SafetensorsReader(rewritten(llama.folder, tmp_path, change))
    with pytest.raises(CheckpointError, match=f"module.{LAYER}"):
        check_names(llama.spec, reader, tied=False)


def test_tied_weights_may_be_stored_as_the_head_alone(tied_llama, llama, tmp_path) -> None:
    """transformers ties them whichever of the two is there."""

    def change(tensors: Tensors) -> Tensors:
        tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
        return tensors

    folder = rewritten(tied_llama.folder, tmp_path / "tied", change)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).model.embed_tokens.weight
    reader = SafetensorsReader(folder)
    check_names(tied_llama.spec, reader, tied=True)
    assert torch.equal(reader.get("model.embed_tokens.weight"), theirs)
    assert "lm_head.weight" not in reader.names()
    assert changes_from(SafetensorsReader(folder), tied_llama.reader)["changed"] == 0

    def lose(tensors: Tensors) -> Tensors:
        del tensors["model.embed_tokens.weight"]
        return tensors

    untied = SafetensorsReader(rewritten(llama.folder, tmp_path / "untied", lose))
    with pytest.raises(CheckpointError, match=r"Missing from the files \(1\)"):
        check_names(llama.spec, untied, tied=False)


def with_names(**more: str) -> Callable[[Tensors], Tensors]:
    """Tensors renamed, by (old part, new part)."""

    def change(tensors: Tensors) -> Tensors:
        for old, new in more.items():
            old = old.replace("__", ".")
            tensors = {name.replace(old, new): tensor for name, tensor in tensors.items()}
        return tensors

    return change


def as_integers(tensors: Tensors) -> Tensors:
    return {
        name: tensor.mul(100).to(torch.int8) if "proj" in name else tensor
        for name, tensor in tensors.items()
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            with_names(up_proj__weight="up_proj.base_layer.weight"),
            "hold a PEFT adapter beside its base .*base_layer.*merge_and_unload",
        ),
        (
            lambda t: {f"base_model.model.{n}.lora_A.weight": v for n, v in t.items()},
            "hold a PEFT adapter",
        ),
        (with_names(up_proj__weight="up_proj.qweight"), "hold quantized weights .*qweight"),
        (
            lambda t: {**t, f"{LAYER}_scale_inv": torch.ones(1)},
            "hold quantized weights .*_scale_inv.*give the checkpoint it was made from",
        ),
        (
            lambda t: {**t, f"{LAYER}.absmax": torch.ones(1)},
            "hold quantized weights .*absmax",
        ),
        (
            lambda t: (
                {f"language_model.{n}": v for n, v in t.items()}
                | {"vision_tower.weight": torch.ones(1)}
            ),
            "hold a text model inside of a larger one .*AutoModelForImageTextToText",
        ),
        (
            lambda t: {n.replace("model.", "model.language_model."): v for n, v in t.items()},
            "hold a text model inside of a larger one",
        ),
        (as_integers, "hold 14 weights as int8 .*no quantization_config"),
        (
            lambda t: {**t, LAYER: t[LAYER].to(torch.float8_e4m3fn)},
            "hold 1 weights as float8_e4m3fn",
        ),
    ],
)
def test_what_is_no_plain_model_is_named(llama, tmp_path, change, message: str) -> None:
    reader = SafetensorsReader(rewritten(llama.folder, tmp_path, change))
    with pytest.raises(CheckpointError, match=message):
        check_names(llama.spec, reader, tied=False)


def test_an_adapters_folder_is_named(tmp_path: Path, llama) -> None:
    """As PEFT saves it: no config.json, and its own names for files."""
    adapter = {"base_model_name_or_path": "owner/base", "peft_type": "LORA"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(adapter))
    save_file({"a": torch.ones(1)}, tmp_path / "adapter_model.safetensors")
    message = "a PEFT adapter of 'owner/base', not a model; .*export --adapter DIR --merge"
    with pytest.raises(CheckpointError, match=message):
        resolve_pretrained(str(tmp_path), cache_dir=None, weights=True)
    shutil.copy(llama.folder / "config.json", tmp_path)
    with pytest.raises(CheckpointError, match=message):
        resolve_pretrained(str(tmp_path), cache_dir=None, weights=True)
    shutil.copy(llama.folder / "model.safetensors", tmp_path)
    message = "a model with a PEFT adapter beside it.*Or remove adapter_config.json"
    with pytest.raises(CheckpointError, match=message):
        resolve_pretrained(str(tmp_path), cache_dir=None, weights=True)


@pytest.mark.parametrize("name", ["quantize_config.json", "quant_config.json"])
def test_a_folder_of_an_older_quantizer_is_named(tmp_path: Path, llama, name: str) -> None:
    shutil.copytree(llama.folder, tmp_path / "model")
    (tmp_path / "model" / name).write_text("{}")
    with pytest.raises(CheckpointError, match=f"a quantized model .*{name}.*dequantize"):
        resolve_pretrained(str(tmp_path / "model"), cache_dir=None, weights=True)


@pytest.mark.parametrize("other", [False, True])
@pytest.mark.parametrize("wrapper", ["Gemma3", "Mistral3", "Qwen2_5_VL"])
def test_the_text_model_of_a_wrapper_is_read(wrapper: str, other: bool, tmp_path: Path) -> None:
    """Saved by transformers itself, and with names of other versions."""
    made = make_wrapper(tmp_path, wrapper)
    tied = wrapper == "Gemma3"
    model = getattr(transformers, f"{wrapper}ForConditionalGeneration").from_pretrained(tmp_path)
    count = len(load_file(tmp_path / "model.safetensors"))
    if other:
        names = _newer if wrapper == "Qwen2_5_VL" else _older
        rewritten(tmp_path, tmp_path, lambda tensors: {names(n): t for n, t in tensors.items()})
    spec = {
        name: tuple(tensor.shape)
        for name, tensor in CausalLM(architecture_from_hf(made.config)).named_parameters()
    }
    reader = SafetensorsReader(tmp_path)
    check_names(spec, reader, tied=tied)
    assert reader.left_out == count - len(spec) > 0
    theirs = dict(model.model.language_model.named_parameters())
    assert {f"model.{name}" for name in theirs} == set(spec) - {"lm_head.weight"}
    assert tied or torch.equal(reader.get("lm_head.weight"), model.lm_head.weight)
    for name, tensor in theirs.items():
        assert torch.equal(reader.get(f"model.{name}"), tensor)


def _newer(name: str) -> str:
    """The name in the memory of transformers 5, which saves Qwen2.5-VL by the older ones."""
    if name.startswith("visual."):
        return f"model.{name}"
    return name.replace("model.", "model.language_model.")


def _older(name: str) -> str:
    name = name.replace("model.language_model.", "language_model.model.")
    if name.startswith("lm_head."):
        return f"language_model.{name}"
    return name.removeprefix("model.") if "language_model" not in name else name
