"""Files of a whole model around a trained text model, compared with those of its base."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_families import (
    IMAGE_TOKENS,
    TinyCheckpoint,
    make_checkpoint,
    make_wrapper,
    open_checkpoint,
    write_processor,
    write_tokenizer,
)
from tokenizers import Tokenizer

from torchprime.checkpoint.export import check_export, export_hf
from torchprime.checkpoint.hf.folder import HfFolder
from torchprime.checkpoint.hf.read import SafetensorsReader
from torchprime.checkpoint.hf.whole import WholeFolder, WholeModel
from torchprime.checkpoint.hf.write import WeightLayout
from torchprime.errors import CheckpointError

ROWS = 328
TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{% endfor %}"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Gemma 3 with images, and all files of one on the hub."""
    folder = tmp_path_factory.mktemp("base")
    make_wrapper(folder, "Gemma3", vocab_size=ROWS, sliding_window=16, eos_token_id=0)
    raw = Tokenizer.from_file(str(write_tokenizer(folder) / "tokenizer.json"))
    raw.add_special_tokens(list(IMAGE_TOKENS))
    raw.save(str(folder / "tokenizer.json"))
    write_processor(folder)
    (folder / "training_args.bin").write_bytes(b"of the base's own training")
    return folder


@pytest.fixture
def copy(base: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(base, tmp_path / "copy"))


def folder_of(made: TinyCheckpoint, **changes: Any) -> HfFolder:
    given: dict[str, Any] = {
        "layout": WeightLayout(made.spec, torch.float32, 10**9),
        "config": made.config,
        "generation_config": None,
        "tokenizer_folder": made.folder,
        "eos_token_id": 0,
    }
    return HfFolder(**{**given, **changes})


def export(base: Path, out: Path, **changes: Any) -> tuple[Path, list[str]]:
    """Export a model with all weights doubled, and return the lines for the user, too."""
    made = open_checkpoint(base)
    hf, whole = folder_of(made, **changes), WholeModel(base)
    lines = check_export(out, WholeFolder(hf, whole))
    weights = {n: made.reader.get(n) * 2 for n in hf.layout.spec}
    for name, shape in hf.layout.spec.items():
        if shape != made.spec[name]:
            weights[name] = torch.ones(shape)
    result = export_hf(out, hf, card="# card", weights=weights.items(), whole=whole)
    assert set(result.notes) <= set(lines)
    assert result.num_parameters == sum(
        t.numel() for t in (SafetensorsReader(out, stored_names=True).get(n) for n in _names(out))
    )
    return out, lines


def _names(folder: Path) -> list[str]:
    return list(SafetensorsReader(folder, stored_names=True).names())


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.suffix != ".safetensors"}


def test_every_small_file_is_the_bases(base: Path, tmp_path: Path) -> None:
    out, lines = export(base, tmp_path / "out")
    assert lines == []
    before, after = files(base), files(out)
    del before["training_args.bin"]
    assert after.pop("README.md") == b"# card"
    # The trained stop tokens are written there.
    assert json.loads(after.pop("generation_config.json"))["eos_token_id"] == 0
    before.pop("generation_config.json")
    assert after == before


def test_transformers_reads_images_with_the_export(base: Path, tmp_path: Path) -> None:
    out, _ = export(base, tmp_path / "out")
    image = np.arange(28 * 28 * 3, dtype=np.uint8).reshape(28, 28, 3)
    found = []
    for folder in (base, out):
        processor: Any = transformers.AutoProcessor.from_pretrained(folder)
        found.append(processor(images=[image], text="a <start_of_image> b", return_tensors="pt"))
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])
    model: Any = transformers.AutoModelForImageTextToText.from_pretrained(out).eval()
    ids = model.generate(**found[1], max_new_tokens=3)
    assert ids.shape[1] == found[1]["input_ids"].shape[1] + 3
    alone: Any = transformers.AutoModelForImageTextToText.from_pretrained(base).eval()
    with torch.no_grad():
        seen, other = (
            m.get_image_features(found[0]["pixel_values"]).pooler_output for m in (model, alone)
        )
    assert torch.equal(seen, other)


def _hub(name: str) -> str:
    return name


def _loaded(name: str) -> str:
    """The name in memory, which other tools save."""
    name = name.replace("language_model.model.", "language_model.")
    return name if name.startswith("lm_head") else f"model.{name}"


@pytest.mark.parametrize("rename", [_hub, _loaded])
def test_other_tensors_keep_names_types_and_bits(
    rename: Callable[[str], str], copy: Path, tmp_path: Path
) -> None:
    path = copy / "model.safetensors"
    tensors = {rename(n): t for n, t in load_file(path).items()}
    path.unlink()
    of_text = {n for n in tensors if "language_model" in n}
    kept = {n: t.to(torch.bfloat16) for n, t in tensors.items() if n not in of_text}
    kept[next(iter(kept))].view(-1)[0] = torch.nan  # of the base: none of our business
    tensors |= kept
    save_file(tensors, path, metadata={"format": "pt"})
    made = open_checkpoint(copy)
    small = WeightLayout(made.spec, torch.float32, 20_000)
    out, _ = export(copy, tmp_path / "out", layout=small)
    assert len(list(out.glob("model-*-of-*.safetensors"))) > 3
    after = SafetensorsReader(out, stored_names=True)
    assert after.names() == SafetensorsReader(copy, stored_names=True).names()
    for name, tensor in tensors.items():
        found = after.get(name)
        if name in of_text:
            assert torch.equal(found, tensor * 2)
        else:
            assert torch.equal(found.view(torch.int16), tensor.view(torch.int16))


def test_a_run_in_another_type_says_so(base: Path, tmp_path: Path) -> None:
    made = open_checkpoint(base)
    narrow = WeightLayout(made.spec, torch.bfloat16, 10**9)
    out, lines = export(base, tmp_path / "out", layout=narrow)
    assert lines == ["config.json: the export has dtype=bfloat16, as the run; the base float32."]
    config = json.loads((out / "config.json").read_text())
    assert config == {**made.config, "dtype": "bfloat16"}
    types = {dtype for _, dtype in SafetensorsReader(out, stored_names=True).names().values()}
    assert types == {torch.bfloat16, torch.float32}


def test_rows_for_new_tokens(base: Path, tmp_path: Path) -> None:
    made = open_checkpoint(base)
    spec = {n: (ROWS + 8, *s[1:]) if s[0] == ROWS else s for n, s in made.spec.items()}
    text = {**made.config["text_config"], "vocab_size": ROWS + 8}
    out, lines = export(
        base,
        tmp_path / "out",
        layout=WeightLayout(spec, torch.float32, 10**9),
        config={**made.config, "text_config": text},
    )
    assert lines == [f"config.json: the export has vocab_size={ROWS + 8}, for new tokens."]
    assert json.loads((out / "config.json").read_text()) == {**made.config, "text_config": text}
    model: Any = transformers.AutoModelForImageTextToText.from_pretrained(out)
    assert model.get_input_embeddings().weight.shape[0] == ROWS + 8


def test_another_chat_template_is_written_in_all_places(base: Path, tmp_path: Path) -> None:
    out, lines = export(base, tmp_path / "out", chat_templates={"default": TEMPLATE})
    assert len(lines) == 1 and "see that the template writes images" in lines[0]
    assert (out / "chat_template.jinja").read_text() == TEMPLATE
    processor: Any = transformers.AutoProcessor.from_pretrained(out)
    assert type(processor).__name__ == "Gemma3Processor"
    assert processor.chat_template == processor.tokenizer.chat_template == TEMPLATE
    assert json.loads((out / "tokenizer_config.json").read_text())["processor_class"]


def test_a_tokenizer_that_readers_would_rebuild(copy: Path, tmp_path: Path) -> None:
    """The base's tokenizer_config.json makes transformers split texts in another way."""
    path = copy / "tokenizer_config.json"
    path.write_text(
        json.dumps(json.loads(path.read_text()) | {"tokenizer_class": "Qwen2Tokenizer"})
    )
    out, lines = export(copy, tmp_path / "out")
    assert len(lines) == 1 and lines[0].startswith("tokenizer_config.json is written anew")
    settings = json.loads((out / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    processor: Any = transformers.AutoProcessor.from_pretrained(out)
    assert processor.tokenizer("Tom has 345 apples")["input_ids"] == (
        Tokenizer.from_file(str(copy / "tokenizer.json")).encode("Tom has 345 apples").ids
    )


def test_a_copy_of_the_tied_embedding_is_left_out(copy: Path, tmp_path: Path) -> None:
    """Trained no more than the rest of the base, it would be another output projection."""
    path = copy / "model.safetensors"
    tensors = load_file(path)
    head = "language_model.lm_head.weight"
    tensors[head] = tensors["language_model.model.embed_tokens.weight"].clone()
    path.unlink()
    save_file(tensors, path, metadata={"format": "pt"})
    made = open_checkpoint(copy)
    spec = {n: s for n, s in made.spec.items() if n != "lm_head.weight"}
    out, _ = export(copy, tmp_path / "out", layout=WeightLayout(spec, torch.float32, 10**9))
    assert set(_names(out)) == set(tensors) - {head}


def test_a_base_that_is_no_wrapper_or_another_one_is_refused(base: Path, tmp_path: Path) -> None:
    plain = make_checkpoint(tmp_path / "plain", "qwen3")
    write_tokenizer(plain.folder)
    with pytest.raises(CheckpointError, match=r"model_type 'qwen3', expected one with a text"):
        WholeFolder(folder_of(plain), WholeModel(plain.folder)).check()
    other = make_wrapper(tmp_path / "other", "Gemma3", vocab_size=ROWS, intermediate_size=16)
    layout = WeightLayout(open_checkpoint(base).spec, torch.float32, 10**9)
    with pytest.raises(CheckpointError, match=r"6 of 28 weights do not fit, the first is model."):
        WholeModel(other.folder).layout(layout)
