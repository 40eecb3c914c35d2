"""Faults of the tokenizers library, its panics too, are one message; its pages stay unseen."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models

from torchprime.data.tokenizer.load import load_tokenizer
from torchprime.errors import CheckpointError
from torchprime.raw_tokenizer import library_faults, load_tokenizer_json


def write(folder: Path, **changes: Any) -> Path:
    plain = Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "ab": 2}, merges=[("a", "b")]))
    content = json.loads(plain.to_str())
    (folder / "tokenizer.json").write_text(json.dumps({**content, **changes}))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "b"}')
    return folder


PRECOMPILED = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}
FIXED = {"type": "FixedLength", "length": 0}
TEMPLATE = {
    **{"type": "TemplateProcessing", "pair": [], "special_tokens": {}},
    "single": [
        {"SpecialToken": {"id": "<s>", "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
    ],
}


@pytest.mark.parametrize(
    ("changes", "panics"),
    [
        ({"normalizer": PRECOMPILED}, True),
        ({"pre_tokenizer": FIXED}, True),
        ({"post_processor": TEMPLATE}, True),
        ({"model": {"type": "WordLevel", "vocab": {"b": 0}, "unk_token": "?"}}, False),
        ({"model": {"type": "Unigram", "unk_id": 0, "vocab": []}}, False),
        ({"model": 3}, False),
    ],
)
def test_a_tokenizer_that_panics_is_one_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], changes: dict[str, Any], panics: bool
) -> None:
    folder = write(tmp_path, **changes)
    with pytest.raises(BaseException) as raw:
        Tokenizer.from_file(str(folder / "tokenizer.json")).encode("a")
    assert (type(raw.value).__name__ == "PanicException") == panics
    assert ("panicked" in capfd.readouterr().err) == panics
    with pytest.raises(CheckpointError, match=f"{tmp_path}.*") as caught:
        load_tokenizer(folder)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
    assert capfd.readouterr().err == ""


def test_what_others_print_meanwhile_is_shown(capfd: pytest.CaptureFixture[str]) -> None:
    with library_faults("x"):
        os.write(2, b"a warning\n")
    with pytest.raises(CheckpointError, match="^x: of mine$"), library_faults("x"):
        os.write(2, b"another\n")
        raise ValueError("of\n mine")
    assert capfd.readouterr().err == "a warning\nanother\n"
    with pytest.raises(KeyboardInterrupt), library_faults("x"):
        raise KeyboardInterrupt


def test_a_text_that_fails_later_is_one_line(tmp_path: Path) -> None:
    """Such as a letter that the vocabulary has no token for, nor one for the unknown."""
    model = {"type": "WordLevel", "vocab": {"a": 0, "b": 1}, "unk_token": "?"}
    tokenizer = load_tokenizer(write(tmp_path, model=model))
    assert tokenizer.encode_ids(["a"]) == [[0]]
    for encode in (tokenizer.encode_ids, tokenizer.encode_batch):
        with pytest.raises(CheckpointError, match=f"the tokenizer in {tmp_path} fails on a text"):
            encode(["c"])


def test_truncation_padding_and_dropout_of_the_file_are_left_out(tmp_path: Path) -> None:
    truncation = dict(direction="Right", max_length=1, strategy="LongestFirst", stride=0)
    padding: dict[str, Any]
    padding = dict(strategy={"Fixed": 9}, direction="Right", pad_id=0, pad_type_id=0, pad_token="a")
    padding["pad_to_multiple_of"] = None
    raw, data = load_tokenizer_json(
        write(tmp_path, truncation=truncation, padding=padding) / "tokenizer.json"
    )
    assert raw.encode("abab").ids == [2, 2] and data.startswith(b"{")
