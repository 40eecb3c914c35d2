"""New special tokens: the ids that transformers gives them, and nothing else of the folder lost."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tokenizers
from tokenizers import models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from torchprime.config.compose import assets_dir
from torchprime.data.tokenizer import new_tokens
from torchprime.data.tokenizer.load import load_tokenizer
from torchprime.data.tokenizer.new_tokens import SpecialTokens, add_special_tokens
from torchprime.errors import CheckpointError

BASE = assets_dir() / "quickstart" / "base"
TEXTS = ["<answer>", "</answer>", "<s>", "<step>", "le", "<|é\n|>"]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped tokenizer with an added token that is not special, and files beside it."""
    folder = tmp_path_factory.mktemp("source")
    for path in BASE.glob("*.json"):
        shutil.copy(path, folder)
    raw = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    raw.add_tokens(["<step>"])
    raw.save(str(folder / "tokenizer.json"))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["additional_special_tokens"] = ["<pad>"]
    settings["added_tokens_decoder"] = {
        str(number): {"content": token.content, "special": token.special}
        for number, token in raw.get_added_tokens_decoder().items()
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "vocab.json").write_text("{}")
    (folder / "chat_template.jinja").write_text("{{ messages }}\r\n")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}")
    return folder


@pytest.fixture(scope="module")
def made(source: Path, tmp_path_factory: pytest.TempPathFactory) -> SpecialTokens:
    return add_special_tokens(source, TEXTS, tmp_path_factory.mktemp("root"))


def test_ids_are_those_of_transformers(source: Path, made: SpecialTokens) -> None:
    theirs: Any = AutoTokenizer.from_pretrained(source)
    theirs.add_special_tokens({"additional_special_tokens": TEXTS})
    ours: Any = PreTrainedTokenizerFast.from_pretrained(made.folder)
    assert ours.get_vocab() == theirs.get_vocab()
    for text in ("a<answer>apples</answer> <step>b<|é\n|><s>\n", *TEXTS):
        ids = theirs(text)["input_ids"]
        assert ours(text)["input_ids"] == ids
        assert load_tokenizer(made.folder).prompt_ids(text) == ids[ids[:2] == [0, 0] :]
        assert ours.decode(ids, skip_special_tokens=True) == theirs.decode(
            ids, skip_special_tokens=True
        )
    assert set(TEXTS) <= set(ours.all_special_tokens)


def test_what_became_of_each_text(made: SpecialTokens) -> None:
    assert made.new == {"<answer>": 513, "</answer>": 514, "<|é\n|>": 515}
    assert made.kept == {"<s>": 0}
    assert made.added_before == {"<step>": 512}
    assert list(made.ordinary) == ["le"]


def test_no_other_token_changes(source: Path, made: SpecialTokens) -> None:
    before, after = load_tokenizer(source), load_tokenizer(made.folder)
    known = after.vocabulary()
    assert {text: known[text] for text in before.vocabulary()} == before.vocabulary()
    assert before.special_tokens | set(TEXTS) == after.special_tokens
    old, new = (json.loads((f / "tokenizer.json").read_text()) for f in (source, made.folder))
    assert {**old, "added_tokens": None} == {**new, "added_tokens": None}
    assert (after.eos_id, after.bos_id, after.pad_id) == (before.eos_id, before.bos_id, 2)


def test_files_beside_it_are_copied_and_second_opinions_left_out(
    source: Path, made: SpecialTokens
) -> None:
    for name in ("chat_template.jinja", "generation_config.json"):
        assert (made.folder / name).read_bytes() == (source / name).read_bytes()
    assert (made.folder / "additional_chat_templates" / "tool_use.jinja").is_file()
    assert not (made.folder / "vocab.json").exists() and not (made.folder / "config.json").exists()
    settings = json.loads((made.folder / "tokenizer_config.json").read_text())
    assert settings["additional_special_tokens"][0] == "<pad>"
    assert settings["added_tokens_decoder"]["513"]["content"] == "<answer>"
    assert settings["added_tokens_decoder"]["512"]["special"]


def test_nothing_is_written_where_all_are_special_already(source: Path, tmp_path: Path) -> None:
    found = add_special_tokens(source, ["<s>", "</s>"], tmp_path / "root")
    assert found.folder == source and found.kept == {"<s>": 0, "</s>": 1}
    assert not list(tmp_path.iterdir())


def test_made_once_per_source_and_texts(source: Path, tmp_path: Path) -> None:
    first = add_special_tokens(source, ["<a>"], tmp_path).folder
    stamp = (first / "tokenizer.json").stat().st_mtime_ns
    assert add_special_tokens(source, ["<a>"], tmp_path).folder == first
    assert (first / "tokenizer.json").stat().st_mtime_ns == stamp
    (first / "additional_chat_templates" / "tool_use.jinja").unlink()  # damage is mended
    assert add_special_tokens(source, ["<a>"], tmp_path).folder == first
    assert (first / "additional_chat_templates" / "tool_use.jinja").is_file()
    other = Path(shutil.copytree(source, tmp_path / "other"))
    (other / "chat_template.jinja").write_text("{{ messages[0] }}")
    ways = [(source, ["<a>"]), (source, ["<b>"]), (source, ["<b>", "<a>"]), (other, ["<a>"])]
    folders = {add_special_tokens(folder, texts, tmp_path).folder for folder, texts in ways}
    assert len(folders) == 4


def test_without_a_place_to_keep_it_the_folder_ends_with_the_process(
    source: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    code = (
        "import sys; from pathlib import Path; from torchprime.data.tokenizer.new_tokens import *\n"
        "found = add_special_tokens(Path(sys.argv[1]), ['<a>'], Path(sys.argv[2]))\n"
        "assert (found.folder / 'tokenizer.json').is_file()\n"
        "print(found.folder)"
    )
    command = [sys.executable, "-c", code, str(source), str(tmp_path / "file" / "root")]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ)
    assert printed.stdout.strip() and not Path(printed.stdout.strip()).exists()


def test_a_new_token_never_shares_an_id(by_hand: SimpleNamespace, tmp_path: Path) -> None:
    """The library counts tokens to find the next id, and is wrong where ids have gaps."""
    raw = tokenizers.Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "c": 3}, merges=[]))
    folder = by_hand.save(raw, tmp_path / "gaps", {"eos_token": "a"})
    with pytest.raises(CheckpointError, match=r"model\.add_special_tokens.*'<x>' the id 3.*'c'"):
        add_special_tokens(folder, ["<x>"], tmp_path / "root")


@pytest.mark.parametrize("name", ["mistral_v3", pytest.param("qwen3", marks=pytest.mark.slow)])
def test_real_tokenizers(name: str, shared_dir: Path, tmp_path: Path) -> None:
    source = shared_dir / "tokenizers" / name
    found = add_special_tokens(source, ["<answer>", "</answer>"], tmp_path)
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(source / "tokenizer.json"))
    theirs.add_special_tokens({"additional_special_tokens": ["<answer>", "</answer>"]})  # type: ignore[dict-item]
    ours = PreTrainedTokenizerFast.from_pretrained(found.folder)
    text = "So it is<answer>42</answer>\n<answer> 6 </answer>"
    assert ours(text)["input_ids"] == theirs(text)["input_ids"]
    assert ours.get_vocab() == theirs.get_vocab()


def test_a_copied_file_that_is_too_large_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(new_tokens, "SMALL", 100)
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    out.mkdir()
    template = source / "chat_template.jinja"
    template.write_text("x" * 101)
    with pytest.raises(CheckpointError, match="chat_template.jinja cannot be read: .*100 bytes"):
        new_tokens._write(out, source, {}, [template])
    assert not list(out.iterdir())
