"""Tokens, rows and padding for a request, and the resulting weights, against transformers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer, LlamaForCausalLM

from torchprime.config.compose import assets_dir, compose_config
from torchprime.errors import CheckpointError
from torchprime.torch_xla_models.train import make_backend
from torchprime.training.setup.model_files import (
    ModelFiles,
    find_architecture,
    pretrained_tensors,
    random_tensors,
)
from torchprime.training.setup.recipe import checked_table, files_of, vocabulary_of

SHIPPED = assets_dir() / "quickstart" / "base"  # tied, 512 rows for 512 tokens
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
Find = Callable[..., ModelFiles]


def added(*texts: str) -> str:
    return f"model.add_special_tokens={json.dumps(texts)}"


@pytest.fixture
def config_of(tmp_path: Path):
    def make(*overrides: str):
        given = ["dataset=file", "dataset.file_dataset_path=x.jsonl", "task.max_steps=1"]
        return compose_config([*given, f"dataset.prepared_dir={tmp_path}/kept", *overrides])

    return make


@pytest.fixture
def find(config_of) -> Find:
    """A config's model files."""
    return lambda *overrides: files_of(config_of(*overrides), weights=False)


@pytest.fixture(scope="module")
def padded(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny` with 20 rows that its tokenizer of 260 tokens does not use."""
    folder = Path(shutil.copytree(tiny, tmp_path_factory.mktemp("padded") / "model"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 280}))
    tensors = load_file(folder / "model.safetensors")
    for name in (EMBEDDING, HEAD):
        tensors[name] = torch.cat([tensors[name], torch.full((20, 16), 9.0)])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_the_fingerprint_tells_new_rows(find: Find) -> None:
    """A run goes on from a checkpoint of an older version, which knew none."""
    given = f"model.pretrained_model={SHIPPED}"
    plain, nothing_new = find(given), find(given, added("</s>"))
    assert plain.vocabulary is None and plain.tokenizer.folder == SHIPPED
    assert nothing_new.new_rows is None and nothing_new.tokenizer.folder == SHIPPED
    assert plain.fingerprint() == nothing_new.fingerprint()
    more = "model.pad_vocab_to_multiple=1024"
    ways = [(more,), (more, "model.resize_embeddings=zeros"), (added("<a>"),)]
    found = {find(given, *way).fingerprint() for way in ways}
    assert len(found | {plain.fingerprint()}) == 4


@pytest.mark.parametrize(
    ("overrides", "tokens", "rows"),
    [
        ([added("<a>", "<b>")], 514, 640),
        ([added("<a>", "<b>"), "model.pad_vocab_to_multiple=1"], 514, 514),
        ([added("<a>", "<b>"), "model.pad_vocab_to_multiple=100"], 514, 600),
        ([added("</s>", "an")], 512, 512),
        (["model.pad_vocab_to_multiple=384"], 512, 768),
        (["model.pad_vocab_to_multiple=256"], 512, 512),
        (["model.resize_embeddings=mean"], 512, 512),
    ],
)
@pytest.mark.parametrize("method", ["mean", "zeros"])
def test_tokens_and_rows_are_those_that_transformers_comes_to(
    overrides: list[str], tokens: int, rows: int, method: str, find: Find
) -> None:
    files = find(
        f"model.pretrained_model={SHIPPED}", *overrides, f"model.resize_embeddings={method}"
    )
    theirs: Any = AutoTokenizer.from_pretrained(SHIPPED)
    asked = files.vocabulary and files.vocabulary.special
    assert asked is not None
    texts = [*asked.new, *asked.kept, *asked.ordinary]
    theirs.add_special_tokens({"additional_special_tokens": texts})
    assert files.tokenizer.vocabulary() == theirs.get_vocab() and len(theirs) == tokens
    model: Any = LlamaForCausalLM.from_pretrained(SHIPPED, dtype=torch.float32)
    old = model.model.embed_tokens.weight.detach().clone()
    if rows > 512:
        model.resize_token_embeddings(rows, mean_resizing=True)
    assert files.architecture.vocab_size == files.hf_config["vocab_size"] == rows
    assert files.shapes[EMBEDDING] == tuple(model.model.embed_tokens.weight.shape)
    tensor_of = pretrained_tensors(files, torch.float32)
    ours = tensor_of(EMBEDDING)
    assert torch.equal(ours[:512], old)
    if method == "zeros":
        assert not ours[512:].any()
    else:
        theirs_new = model.model.embed_tokens.weight.detach()[512:]
        noise = (2 * 1e-9) ** 0.5 * old.std(0).max().item()  # of two draws
        torch.testing.assert_close(ours[512:], theirs_new, rtol=0, atol=6 * noise)
    for name, parameter in model.named_parameters():
        assert name in (EMBEDDING, HEAD) or torch.equal(tensor_of(name), parameter)


def test_new_tokens_take_unused_rows_first(padded: Path, find: Find) -> None:
    files = find(f"model.pretrained_model={padded}", added("<a>", "<b>"))
    assert files.architecture.vocab_size == 280 and files.new_rows is not None
    assert files.new_rows.made == [260, 261]
    for name in (EMBEDDING, HEAD):
        old = load_file(padded / "model.safetensors")[name]
        new = pretrained_tensors(files, torch.float32)(name)
        others = [i for i in range(280) if i not in (260, 261)]
        assert torch.equal(new[others], old[others])
        torch.testing.assert_close(new[260], old[others].mean(0), rtol=0, atol=1e-3)
    assert files.vocabulary is not None
    assert files.vocabulary.describe()[0].endswith(
        "260 -> 262 tokens, embeddings 280 rows; 2 new rows, 2 of them unused before: the mean of "
        "the others plus small noise"
    )


def test_more_than_the_unused_rows(padded: Path, find: Find) -> None:
    texts = [f"<{i}>" for i in range(25)]
    files = find(f"model.pretrained_model={padded}", added(*texts))
    assert files.new_rows is not None and files.architecture.vocab_size == 384
    assert files.new_rows.unused == tuple(range(260, 280))
    assert files.new_rows.made == list(range(260, 384))


def test_a_larger_tokenizer_is_refused_unless_rows_are_asked_for(
    padded: Path, tiny: Path, find: Find, make_tokenizer_folder, tmp_path: Path
) -> None:
    larger = make_tokenizer_folder(tmp_path / "larger", ["<one>", "<two>"])
    given = [f"model.pretrained_model={tiny}", f"model.tokenizer_name={larger}"]
    with pytest.raises(CheckpointError, match=r"ids up to 261.*model\.resize_embeddings=mean"):
        find(*given)
    files = find(*given, "model.resize_embeddings=mean")
    assert files.new_rows is not None and files.new_rows.made == list(range(260, 384))
    assert files.vocabulary is not None and files.vocabulary.tokens_before == 260
    # If the model has unused rows, its own tokenizer tells which they are.
    files = find(f"model.pretrained_model={padded}", given[1], "model.resize_embeddings=zeros")
    assert files.new_rows is not None and files.new_rows.made == [260, 261]
    files = find(f"model.pretrained_model={padded}", given[1], added("<three>"))
    assert files.new_rows is not None and files.new_rows.made == [260, 261, 262]


def test_a_checkpoints_own_tokenizer_may_be_the_larger_one(
    tiny: Path, find: Find, make_tokenizer_folder, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny, tmp_path / "model"))
    make_tokenizer_folder(folder, ["<one>", "<two>"])
    with pytest.raises(CheckpointError, match=r"model\.resize_embeddings=mean"):
        find(f"model.pretrained_model={folder}")
    files = find(f"model.pretrained_model={folder}", "model.resize_embeddings=zeros")
    assert files.new_rows is not None and files.new_rows.made == list(range(260, 384))


def test_a_tokenizer_of_another_family_is_refused(tiny: Path, find: Find) -> None:
    """Its tokens would get rows that were trained for others."""
    given = [f"model.pretrained_model={tiny}", f"model.tokenizer_name={SHIPPED}"]
    with pytest.raises(CheckpointError, match=r"model\.tokenizer_name: .* does not extend the ch"):
        find(*given, "model.resize_embeddings=mean")


@pytest.mark.parametrize("method", ["mean", "zeros"])
def test_random_weights(tiny: Path, find: Find, method: str) -> None:
    """All rows are drawn; zeros are zeros."""
    keys = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    config = json.loads((tiny / "config.json").read_text())
    names = (*keys, "num_attention_heads", "num_key_value_heads", "model_type")
    shape = [f"+model.architecture.{name}={config[name]}" for name in names]
    scratch = [
        "task=train",
        "model.pretrained_model=null",
        f"model.tokenizer_name={tiny}",
        "model.architecture={}",
    ]
    files = find(*scratch, *shape, added("<a>"), f"model.resize_embeddings={method}")
    tensor_of = random_tensors(files, seed=7)
    for name in (EMBEDDING, HEAD):
        tensor = tensor_of(name)
        assert tensor.shape == files.shapes[name] == (384, 16)
        spread = [part.std().item() for part in (tensor[:260], tensor[260:])]
        expected = [0.02, 0.02 if method == "mean" else 0.0]
        assert spread == pytest.approx(expected, rel=0.1)
    assert files.vocabulary is not None
    told = files.vocabulary.describe()[0]
    assert told.endswith("random, like the others" if method == "mean" else "zeros")


@pytest.mark.parametrize("mesh", [("ici_mesh.fsdp=2", "ici_mesh.tensor=2"), ("ici_mesh.fsdp=4",)])
def test_sharded_on_xla_and_back(tiny: Path, config_of, mesh: tuple[str, ...]) -> None:
    """No program is compiled for it."""
    config = config_of(
        f"model.pretrained_model={tiny}", added("<a>"), "task.global_batch_size=4", *mesh
    )
    files = files_of(config, weights=True)
    tensor_of = pretrained_tensors(files, torch.float32)
    expected: dict[str, Tensor] = {name: tensor_of(name).clone() for name in files.shapes}
    backend = make_backend(config)
    table, _ = checked_table(config, files.build(torch.float32))
    backend.place(files.build(torch.float32), table, tensor_of, torch.float32)
    found = dict(backend.weights())
    assert found.keys() == expected.keys() and found[HEAD].shape == (384, 16)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_what_is_compiled_ahead_of_time_has_the_rows(tiny: Path, config_of) -> None:
    def rows(*overrides: str) -> int:
        config = config_of(*overrides)
        found, _ = find_architecture(
            pretrained_model=config.model.pretrained_model,
            architecture=config.model.architecture,
            cache_dir=None,
            tokenizer_name=config.model.tokenizer_name,
            vocabulary=vocabulary_of(config),
        )
        return found["vocab_size"]

    assert rows(f"model.pretrained_model={tiny}") == 260
    assert rows(f"model.pretrained_model={tiny}", added("<a>")) == 384
    named = ["model=llama-3.2-1b", "model.pretrained_model=null", "task=train"]
    named.append("model.architecture.vocab_size=260")
    assert rows(*named) == 260  # the tokenizer is not needed for that
    assert rows(*named, f"model.tokenizer_name={tiny}", added("<a>")) == 384
