"""The tokenizer of an export: exact ids in every reader, special tokens, chat templates."""

from __future__ import annotations

import json
import shutil

import pytest
import transformers
from tokenizers import Tokenizer

from torchprime.checkpoint.hf import portable
from torchprime.checkpoint.hf.portable import (
    PROBES,
    check_tokenizer,
    write_tokenizer,
)
from torchprime.errors import CheckpointError
from torchprime.files.atomic import write_json


def exported(tmp_path, source, eos=0, model_type="llama"):
    out = tmp_path / "exported"
    out.mkdir()
    write_tokenizer(out, source, eos=eos)
    write_json(out / "config.json", {"model_type": model_type})
    return out


def settings_of(folder):
    return json.loads((folder / "tokenizer_config.json").read_text())


def edited(tmp_path, tokenizer_folder, **changes):
    source = tmp_path / "source"
    shutil.copytree(tokenizer_folder, source)
    (source / "tokenizer_config.json").write_text(json.dumps({**settings_of(source), **changes}))
    return source


def test_a_tokenizer_that_is_too_large_is_refused(tmp_path, tokenizer_folder, monkeypatch):
    monkeypatch.setattr(portable, "LARGE", 100)
    with pytest.raises(CheckpointError, match="tokenizer.json cannot be read: .*more than 100"):
        write_tokenizer(tmp_path, tokenizer_folder, eos=0)


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen3"])
def test_tokenizer_gives_the_raw_ids_through_auto_tokenizer(tmp_path, tokenizer_folder, model_type):
    out = exported(tmp_path, tokenizer_folder, model_type=model_type)
    assert (out / "tokenizer.json").read_bytes() == (
        tokenizer_folder / "tokenizer.json"
    ).read_bytes()
    raw = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    auto = transformers.AutoTokenizer.from_pretrained(out)
    fast = transformers.PreTrainedTokenizerFast.from_pretrained(out)
    for text in (*PROBES, "<|end|>12<|other|>"):
        assert auto(text)["input_ids"] == fast(text)["input_ids"] == raw.encode(text).ids
    assert auto.eos_token_id == 0
    check_tokenizer(out)


@pytest.mark.parametrize(
    ("folder", "eos", "model_type"),
    [
        ("models/stories260K", 2, "llama"),
        ("tokenizers/qwen3", 151645, "qwen3"),
        ("tokenizers/qwen3", 151645, "qwen2"),
        ("tokenizers/mistral_v3", 2, "mistral"),
    ],
)
def test_real_tokenizers_survive(shared_dir, tmp_path, folder, eos, model_type):
    out = exported(tmp_path, shared_dir / folder, eos=eos, model_type=model_type)
    check_tokenizer(out)
    auto = transformers.AutoTokenizer.from_pretrained(out)
    assert auto.eos_token_id is not None


def test_a_special_token_that_is_read_in_another_way_is_found(tmp_path, tokenizer_folder):
    """transformers believes tokenizer_config.json's own description of an added token."""
    described = {"content": "<|other|>", "special": True, "single_word": True}
    out = exported(
        tmp_path, edited(tmp_path, tokenizer_folder, added_tokens_decoder={"1": described})
    )
    with pytest.raises(CheckpointError, match=r"'a<\|other\|>b' becomes .* says"):
        check_tokenizer(out)


def test_tokenizer_config_is_what_457_can_load(tmp_path, tokenizer_folder):
    source = edited(
        tmp_path,
        tokenizer_folder,
        tokenizer_class="TokenizersBackend",
        extra_special_tokens=["<|other|>"],
        add_bos_token=True,
        auto_map={"AutoTokenizer": ["evil.T", None]},
    )
    out = exported(tmp_path, source)
    settings = settings_of(out)
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert settings["additional_special_tokens"] == ["<|other|>"]
    for key in ("backend", "extra_special_tokens", "auto_map", "add_bos_token"):
        assert key not in settings
    auto = transformers.AutoTokenizer.from_pretrained(out)
    assert "<|other|>" in auto.all_special_tokens
    special = json.loads((out / "special_tokens_map.json").read_text())
    assert special == {"eos_token": "<|end|>", "additional_special_tokens": ["<|other|>"]}


def test_missing_eos_token_is_the_trained_one(tmp_path, tokenizer_folder):
    out = exported(tmp_path, edited(tmp_path, tokenizer_folder, eos_token=None), eos=1)
    assert settings_of(out)["eos_token"] == "<|other|>"


TEMPLATE = "{%- for m in messages %}<|other|>{{ m['content'] }}<|end|>\r\n{% endfor %}"
MESSAGES = [{"role": "user", "content": "Hé"}]


@pytest.mark.parametrize("place", ["inline", "file"])
def test_chat_template_is_written_as_file_and_inline(tmp_path, tokenizer_folder, place):
    source = edited(
        tmp_path, tokenizer_folder, chat_template=TEMPLATE if place == "inline" else "old"
    )
    if place == "file":
        (source / "chat_template.jinja").write_bytes(TEMPLATE.encode())
    out = exported(tmp_path, source)
    assert (out / "chat_template.jinja").read_bytes() == TEMPLATE.encode()
    assert settings_of(out)["chat_template"] == TEMPLATE
    render = {"tokenize": False}
    ours = transformers.AutoTokenizer.from_pretrained(out).apply_chat_template(MESSAGES, **render)
    assert ours == "<|other|>Hé<|end|>\n"  # Jinja makes all line ends \n


def test_named_chat_templates_survive(tmp_path, tokenizer_folder):
    entries = [{"name": "default", "template": "A"}, {"name": "tool_use", "template": "B"}]
    out = exported(tmp_path, edited(tmp_path, tokenizer_folder, chat_template=entries))
    assert settings_of(out)["chat_template"] == entries
    auto = transformers.AutoTokenizer.from_pretrained(out)
    assert auto.chat_template == {"default": "A", "tool_use": "B"}


def test_no_chat_template_stays_none(tmp_path, tokenizer_folder):
    out = exported(tmp_path, tokenizer_folder)
    assert not (out / "chat_template.jinja").exists() and "chat_template" not in settings_of(out)


def test_folder_without_tokenizer_json_says_how_to_make_one(tmp_path):
    with pytest.raises(CheckpointError, match="There is no tokenizer.json .*save_pretrained"):
        write_tokenizer(tmp_path, tmp_path, eos=0)


def test_malformed_tokenizer_files_are_named(tmp_path, tokenizer_folder):
    source = edited(tmp_path, tokenizer_folder)
    (source / "tokenizer_config.json").write_text("{")
    with pytest.raises(CheckpointError, match="tokenizer_config.json cannot be read"):
        write_tokenizer(tmp_path, source, eos=0)
    (source / "tokenizer_config.json").unlink()
    (source / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="tokenizer.json is not a tokenizer"):
        write_tokenizer(tmp_path, source, eos=0)
