"""Facts of a tokenizer folder: ids of BOS, EOS and padding, and BOS at the start of a text."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import tokenizers

from torchprime.data.tokenizer.load import Tokenizer, load_tokenizer
from torchprime.errors import CheckpointError

MakeTokenizer = Callable[..., Tokenizer]

TEXTS = ["Once upon a time", " two  spaces ", "naïve ☃ 😀 e\u0301", "\n\n\tx = 4*12", "", "</s>"]


def error_of(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_tokenizer(folder)
    return str(caught.value)


def test_real_folders(shared_dir: Path) -> None:
    stories = load_tokenizer(shared_dir / "models/stories260K")
    assert (stories.vocab_size, stories.bos_id, stories.eos_id) == (512, 1, 2)
    assert (stories.pad_id, stories.add_bos, stories.generation_eos_ids) == (2, True, (1, 2))
    qwen = load_tokenizer(shared_dir / "tokenizers/qwen3")
    assert (qwen.vocab_size, qwen.max_id, qwen.bos_id) == (151669, 151668, None)
    assert (qwen.eos_id, qwen.pad_id, qwen.add_bos) == (151645, 151643, False)


def test_ids_equal_those_of_transformers(shared_dir: Path) -> None:
    transformers = pytest.importorskip("transformers")
    for folder in ("models/stories260K", "tokenizers/qwen3"):
        ours = load_tokenizer(shared_dir / folder)
        theirs = transformers.PreTrainedTokenizerFast.from_pretrained(shared_dir / folder)
        assert [ours.prompt_ids(text) for text in TEXTS] == [theirs(t)["input_ids"] for t in TEXTS]


def test_ids_without_spans_are_the_same(real_tokenizer: Tokenizer) -> None:
    encoded = real_tokenizer.encode_batch(TEXTS)
    assert [e.ids for e in encoded] == real_tokenizer.encode_ids(TEXTS)
    raw = tokenizers.Tokenizer.from_file(str(real_tokenizer.folder / "tokenizer.json"))
    raw.post_processor = None  # pyright: ignore[reportAttributeAccessIssue]
    for e, text in zip(encoded, TEXTS, strict=True):
        expected = raw.encode(text, add_special_tokens=False)
        assert e.ids == expected.ids
        assert [e.span(i) for i in range(len(e.ids))] == expected.offsets
    assert real_tokenizer.decode(encoded[0].ids) == TEXTS[0]


def test_spans_are_not_trimmed(build: SimpleNamespace, make_tokenizer: MakeTokenizer) -> None:
    raw = build.byte_level([("Ġ", "a")], trim_offsets=True)
    encoded = make_tokenizer(raw).encode_batch([": a"])[0]
    assert [encoded.span(i) for i in range(2)] == [(0, 1), (1, 3)]


@pytest.mark.parametrize(
    ("processor", "config", "expected"),
    [
        (False, {}, (None, False)),
        (False, {"bos_token": "<s>"}, (0, False)),
        (False, {"bos_token": "<s>", "add_bos_token": True}, (0, True)),
        (False, {"bos_token": None, "add_bos_token": True}, (None, False)),
        (True, {}, (0, True)),
        (True, {"bos_token": {"content": "<s>", "lstrip": False}}, (0, True)),
        (True, {"bos_token": "<s>", "add_bos_token": False}, (0, False)),
    ],
)
def test_bos(
    build: SimpleNamespace,
    make_tokenizer: MakeTokenizer,
    processor: bool,
    config: dict,
    expected: tuple[int | None, bool],
) -> None:
    raw = build.begin_with_bos(build.byte_level()) if processor else build.byte_level()
    tokenizer = make_tokenizer(raw, **config)
    assert (tokenizer.bos_id, tokenizer.add_bos) == expected
    assert tokenizer.prompt_ids("a").count(0) == int(expected[1])
    assert tokenizer.prompt_ids("<s>a").count(0) == 1


def test_padding_is_its_own_token_or_eos(
    build: SimpleNamespace, make_tokenizer: MakeTokenizer
) -> None:
    assert make_tokenizer(build.byte_level(), pad_token="<pad>").pad_id == 2
    assert make_tokenizer(build.byte_level()).pad_id == 1
    assert make_tokenizer(build.byte_level(), pad_token=None).pad_id == 1


def test_settings_saved_by_someones_call_are_undone(
    build: SimpleNamespace, make_tokenizer: MakeTokenizer
) -> None:
    raw = build.byte_level()
    raw.enable_truncation(2)
    raw.enable_padding(length=9)
    assert make_tokenizer(raw).decode(make_tokenizer(raw).prompt_ids("abcd")) == "abcd"
    assert len(make_tokenizer(raw).prompt_ids("abcd")) == 4


def test_special_tokens_map_fills_in(build: SimpleNamespace, tmp_path: Path) -> None:
    folder = build.save(build.byte_level(), tmp_path, None)
    (folder / "special_tokens_map.json").write_text('{"eos_token": {"content": "</s>"}}')
    assert load_tokenizer(folder).eos_id == 1


def test_fingerprint_changes_with_ids_and_rules_only(
    build: SimpleNamespace, make_tokenizer: MakeTokenizer
) -> None:
    base = make_tokenizer(build.byte_level()).fingerprint()
    assert base == make_tokenizer(build.byte_level(), chat_template="x").fingerprint()
    assert len(base) == 64
    others = {
        make_tokenizer(build.byte_level([("a", "b")])).fingerprint(),
        make_tokenizer(build.byte_level(), eos_token="<s>").fingerprint(),
        make_tokenizer(build.byte_level(), pad_token="<pad>").fingerprint(),
        make_tokenizer(build.byte_level(), bos_token="<s>", add_bos_token=True).fingerprint(),
        make_tokenizer(build.sentencepiece_like()).fingerprint(),
    }
    assert len(others | {base}) == 6


def test_no_folder_no_file_no_eos(build: SimpleNamespace, tmp_path: Path) -> None:
    assert "does not exist" in error_of(tmp_path / "none")
    (tmp_path / "tokenizer.model").touch()
    message = error_of(tmp_path)
    assert f"no tokenizer.json in {tmp_path} (it has tokenizer.model)" in message
    assert "Convert with: python -c" in message
    build.save(build.byte_level(), tmp_path, {})
    message = error_of(tmp_path)
    assert "names no eos_token" in message
    assert f'Add "eos_token": "<its text>" to {tmp_path}/tokenizer_config.json' in message


def test_broken_files(build: SimpleNamespace, tmp_path: Path) -> None:
    build.save(build.byte_level(), tmp_path, {"eos_token": "<end>"})
    assert "eos_token '<end>'" in error_of(tmp_path)
    assert "is not in its vocabulary of 259 tokens" in error_of(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    assert "tokenizer_config.json cannot be read as JSON" in error_of(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[]")
    assert "holds a list, expected a JSON object" in error_of(tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": "none"}))
    assert "is not a tokenizer that can be loaded" in error_of(tmp_path)


def test_bos_that_disagrees_or_comes_twice(build: SimpleNamespace, tmp_path: Path) -> None:
    raw = build.begin_with_bos(build.byte_level())
    build.save(raw, tmp_path, {"eos_token": "</s>", "bos_token": "<pad>"})
    assert "begins every text with '<s>'. Make them agree" in error_of(tmp_path)
    raw.post_processor = type(raw.post_processor)(
        single="<s> <pad> $A", special_tokens=[("<s>", 0), ("<pad>", 2)]
    )
    build.save(raw, tmp_path, {"eos_token": "</s>"})
    assert "begins every text with 2 tokens (<s> <pad>)" in error_of(tmp_path)
