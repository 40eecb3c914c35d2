"""Whole runs of model families on the native backend: fused projections, models with images."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from run_fixtures import VOCAB
from tiny_families import (
    IMAGE_TOKENS,
    TinyCheckpoint,
    make_checkpoint,
    make_wrapper,
    write_processor,
)
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor

from torchprime.checkpoint.hf.read import SafetensorsReader
from torchprime.cli.main import main as torchprime
from torchprime.config.entry import run_main
from torchprime.torch_native.train import main

IDS = torch.arange(40)[None]


@pytest.fixture
def train(
    command: Callable[..., list[str]],
    make_tokenizer_folder: Callable[..., Path],
    tmp_path: Path,
) -> Callable[..., Path]:
    """Train a checkpoint, which gets a tokenizer, and return the run's folder."""

    def make(base: TinyCheckpoint, *overrides: str) -> Path:
        if not (base.folder / "tokenizer.json").exists():
            make_tokenizer_folder(base.folder)
        place = (f"model.pretrained_model={base.folder}", f"output_dir={tmp_path}", "run_name=run")
        single = ("ici_mesh.fsdp=1", "ici_mesh.tensor=1", "task.max_steps=3")
        assert run_main(main, command(*place, *single, *overrides)) == 0
        return tmp_path / "run"

    return make


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def test_peft_computes_with_an_adapter_of_fused_projections(
    train: Callable[..., Path], tmp_path: Path
) -> None:
    """The folder names the fused modules; merged, it is the same model."""
    base = make_checkpoint(tmp_path / "base", "phi3_window", vocab_size=VOCAB)
    rate = "task.optimizer.learning_rate=0.03"
    export = train(base, "adapter=lora", "adapter.rank=4", "export.adapter=both", rate) / "export"
    named = json.loads((export / "adapter" / "adapter_config.json").read_text())["target_modules"]
    assert sorted(named) == ["down_proj", "gate_up_proj", "o_proj", "qkv_proj"]
    plain = AutoModelForCausalLM.from_pretrained(base.folder, dtype=torch.float32)
    before = logits(plain)
    adapted = logits(peft.PeftModel.from_pretrained(plain, str(export / "adapter")))
    merged = logits(AutoModelForCausalLM.from_pretrained(export, dtype=torch.float32))
    torch.testing.assert_close(adapted, merged, rtol=1e-5, atol=1e-5)
    assert (adapted - before).abs().max() > 0.01


@pytest.mark.parametrize("wrapper", ["Gemma3", "Mistral3", "Qwen2_5_VL"])
def test_the_text_model_of_a_model_with_images_is_trained_and_exported(
    wrapper: str,
    train: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = {"sliding_window": 16} if wrapper == "Gemma3" else {}
    base = make_wrapper(tmp_path / "base", wrapper, vocab_size=VOCAB, **text)
    run = train(base, "checkpoint.every_steps=3")
    family = {"Gemma3": "gemma3_text", "Mistral3": "mistral", "Qwen2_5_VL": "qwen2"}[wrapper]
    printed = capsys.readouterr().err
    assert f"its text model is trained and exported, as {family}; the" in printed
    assert "logits of transformers match the trainer's" in printed
    trained = AutoModelForCausalLM.from_pretrained(run / "export")
    assert trained.config.model_type == family
    card = (run / "export" / "README.md").read_text()
    assert f"the text model of the base, whose `model_type` is `{wrapper.lower()}`" in card
    # Its weights in the place of the wrapper's own give the same logits there.
    whole = getattr(transformers, f"{wrapper}ForConditionalGeneration").from_pretrained(base.folder)
    before = logits(whole)
    inner = {n.removeprefix("model."): p for n, p in trained.named_parameters()}
    head = inner.pop("lm_head.weight", None)
    whole.model.language_model.load_state_dict(inner, strict=True)
    if head is not None:
        whole.lm_head.weight.data.copy_(head)
    torch.testing.assert_close(logits(trained), logits(whole), rtol=1e-5, atol=1e-5)
    assert (logits(whole) - before).abs().max() > 1e-3
    # A checkpoint of the run gives the same export.
    out = tmp_path / "again"
    assert torchprime(["export", str(run), "--out", str(out)]) == 0
    one, two = (SafetensorsReader(folder) for folder in (run / "export", out))
    assert set(one.names()) == set(two.names())
    assert all(torch.equal(one.get(name), two.get(name)) for name in one.names())
    assert (out / "README.md").read_text() == card


def test_an_adapter_of_a_model_with_images_is_pefts_over_the_whole(
    train: Callable[..., Path], tmp_path: Path
) -> None:
    base = make_wrapper(tmp_path / "base", "Gemma3", vocab_size=VOCAB, sliding_window=16)
    given = ("adapter=lora", "adapter.rank=4", "task.optimizer.learning_rate=0.03")
    run = train(base, *given, "export.adapter=both", "checkpoint.every_steps=3")
    text = AutoModelForCausalLM.from_pretrained(run / "export")
    assert text.config.model_type == "gemma3_text"
    inside = run / "export" / "adapter"  # PEFT's, over the whole model
    whole = transformers.Gemma3ForConditionalGeneration.from_pretrained(base.folder)
    before = logits(whole)
    adapted: Any = peft.PeftModel.from_pretrained(whole, str(inside))
    found = logits(adapted)
    torch.testing.assert_close(found, logits(text), rtol=1e-5, atol=1e-5)
    assert (found - before).abs().max() > 0.01
    assert {n.split(".")[3] for n, p in adapted.named_parameters() if "lora_" in n} == {
        "language_model"
    }
    card = (inside / "README.md").read_text()
    assert "whose `model_type` is `gemma3`, and is loaded over the whole base" in card
    assert "AutoModelForImageTextToText.from_pretrained" in card
    assert torchprime(["verify", str(inside), "--base", str(base.folder)]) == 0
    # The run's checkpoint gives the same folder, and training starts from it.
    again = tmp_path / "again"
    assert torchprime(["export", str(run), "--out", str(again)]) == 0
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (again / name).read_bytes() == (inside / name).read_bytes()
    more = train(
        base, *given, f"adapter.pretrained={again}", "export.adapter=adapter", "run_name=more"
    )
    named = json.loads((more.parent / "more" / "export" / "adapter_config.json").read_text())
    assert (
        named["target_modules"]
        == json.loads((again / "adapter_config.json").read_text())["target_modules"]
    )
    merged = tmp_path / "merged"
    assert torchprime(["export", "--adapter", str(inside), "--merge", "--out", str(merged)]) == 0
    trained = AutoModelForCausalLM.from_pretrained(merged)
    torch.testing.assert_close(logits(trained), logits(text), rtol=1e-5, atol=1e-5)


ALL = ("export.parts=all", "task.optimizer.learning_rate=0.03")


@pytest.fixture
def gemma(make_tokenizer_folder: Callable[..., Path], tmp_path: Path) -> TinyCheckpoint:
    """A Gemma 3 with the processor of its images."""
    rows = VOCAB + len(IMAGE_TOKENS)
    base = make_wrapper(tmp_path / "base", "Gemma3", vocab_size=rows, sliding_window=16)
    make_tokenizer_folder(base.folder, IMAGE_TOKENS)
    write_processor(base.folder)
    return base


def describe(folder: Path) -> torch.Tensor:
    """Continue a text with an image, as a user of the folder does."""
    processor: Any = AutoProcessor.from_pretrained(folder)
    image = np.arange(28 * 28 * 3, dtype=np.uint8).reshape(28, 28, 3)
    given = processor(images=[image], text="say <start_of_image> ", return_tensors="pt")
    model: Any = AutoModelForImageTextToText.from_pretrained(folder)
    return model.generate(**given, max_new_tokens=4, do_sample=False)[0]


def same_but_text(base: Path, export: Path) -> None:
    """The tensors of other parts and the small files of images are the base's to the byte."""
    before, after = (SafetensorsReader(folder, stored_names=True) for folder in (base, export))
    assert before.names() == after.names()
    for name in after.names():
        assert torch.equal(before.get(name), after.get(name)) == ("language_model" not in name)
    for name in ("config.json", "processor_config.json", "tokenizer.json", "chat_template.jinja"):
        assert (base / name).read_bytes() == (export / name).read_bytes()


def test_all_parts_of_a_model_with_images_are_exported(
    gemma: TinyCheckpoint,
    train: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = train(gemma, *ALL, "checkpoint.every_steps=3", "task.sample_prompts=0")
    printed = capsys.readouterr().err
    assert "the export is the whole model, with the 50 weights of its other parts" in printed
    assert "logits of transformers match the trainer's" in printed
    export = run / "export"
    same_but_text(gemma.folder, export)
    assert len(describe(export)) > 4
    card = (export / "README.md").read_text()
    assert "This is the whole model, whose `model_type` is `gemma3`." in card
    assert "pipeline_tag: image-text-to-text" in card
    assert torchprime(["verify", str(export), "--base", str(gemma.folder)]) == 0
    assert "are the base's, bit for bit" in capsys.readouterr().out
    # A checkpoint gives the same files, and the text model alone on request.
    again, text = tmp_path / "again", tmp_path / "text"
    assert torchprime(["export", str(run), "--out", str(again)]) == 0
    for path in export.iterdir():
        if path.name != "certificate.json":
            assert (again / path.name).read_bytes() == path.read_bytes(), path.name
    assert torchprime(["export", str(run), "--out", str(text), "--parts", "text"]) == 0
    assert "This is the text model of the base" in (text / "README.md").read_text()
    alone = AutoModelForCausalLM.from_pretrained(text)
    whole = AutoModelForImageTextToText.from_pretrained(export)
    torch.testing.assert_close(logits(alone), logits(whole), rtol=1e-5, atol=1e-5)
    # The export is a base in its turn.
    mean = tmp_path / "mean"
    assert torchprime(["average", str(export), str(again), "--out", str(mean)]) == 0
    same_but_text(gemma.folder, mean)
    # Without the base, the other parts are nowhere.
    gemma.folder.rename(tmp_path / "moved")
    capsys.readouterr()
    given = ["export", str(run), "--out", str(tmp_path / "no")]
    assert torchprime(given) == 2
    assert "Expected --base FOLDER, or --parts text" in capsys.readouterr().err
    assert torchprime([*given, "--base", str(tmp_path / "moved")]) == 0
    same_but_text(tmp_path / "moved", tmp_path / "no")


def test_an_adapter_is_merged_in_all_parts(
    gemma: TinyCheckpoint, train: Callable[..., Path], tmp_path: Path
) -> None:
    run = train(gemma, *ALL, "adapter=lora", "adapter.rank=4", "export.adapter=both")
    export = run / "export"
    before, after = (
        SafetensorsReader(folder, stored_names=True) for folder in (gemma.folder, export)
    )
    changed = {n for n in before.names() if not torch.equal(before.get(n), after.get(n))}
    assert len(changed) == 14 and all(n.startswith("language_model.model.layers") for n in changed)
    plain: Any = AutoModelForImageTextToText.from_pretrained(gemma.folder)
    adapted: Any = peft.PeftModel.from_pretrained(plain, str(export / "adapter"))
    whole = AutoModelForImageTextToText.from_pretrained(export)
    torch.testing.assert_close(logits(adapted), logits(whole), rtol=1e-5, atol=1e-5)
    assert torchprime(["verify", str(export), "--base", str(gemma.folder)]) == 0
    out, inside = tmp_path / "merged", str(export / "adapter")
    given = ["export", "--adapter", inside, "--merge", "--parts", "all", "--out", str(out)]
    assert torchprime(given) == 0
    assert (out / "model.safetensors").read_bytes() == (export / "model.safetensors").read_bytes()
    assert len(describe(out)) > 4


def test_a_model_without_other_parts_is_refused(
    tiny: Path,
    command: Callable[..., list[str]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = (f"output_dir={tmp_path}", "run_name=refused", "export.parts=all")
    assert run_main(main, command(*given)) == 2
    said = capsys.readouterr().err
    assert "export.parts: given 'all', expected text, since the model (llama) has no parts" in said
    assert not (tmp_path / "refused").exists()
