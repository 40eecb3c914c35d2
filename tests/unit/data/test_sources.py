"""Rows come in order with ids a person can look up; what cannot be read is one clear message."""

from __future__ import annotations

import gzip
import json
import time
from pathlib import Path

import fsspec
import pytest

from torchprime.data import sources
from torchprime.data.sources import SourceSpec, read_rows
from torchprime.errors import DataError


def rows_in(path: object, section: str = "dataset") -> list[tuple[str, dict]]:
    return list(read_rows(SourceSpec(file_dataset_path=str(path)), section))


def error_of(source: SourceSpec, section: str = "dataset") -> str:
    with pytest.raises(DataError) as caught:
        list(read_rows(source, section))
    return str(caught.value)


def error_in(folder: Path, content: bytes, name: str = "rows.jsonl") -> str:
    (folder / name).write_bytes(content)
    return error_of(SourceSpec(file_dataset_path=str(folder / name)))


def test_lines_with_their_numbers_blank_ones_counted(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\n  \n{"a": "\xc3\xa9\xe2\x80\xa8"}')
    assert rows_in(path) == [("train.jsonl:1", {"a": 1}), ("train.jsonl:4", {"a": "é\u2028"})]


@pytest.mark.parametrize("name", ["rows.json", "rows.txt"])
def test_array_or_lines_by_content(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text(json.dumps([{"a": 1}, {"a": 2}], indent=2))
    assert rows_in(path) == [(f"{name}#1", {"a": 1}), (f"{name}#2", {"a": 2})]
    path.write_text('{"a": 1}\n{"a": 2}\n')
    assert rows_in(path) == [(f"{name}:1", {"a": 1}), (f"{name}:2", {"a": 2})]


def test_fsspec_url_and_compressed_file(tmp_path: Path) -> None:
    with fsspec.open("memory://bucket/rows.jsonl", "wb") as handle:
        handle.write(b'{"a": 1}\n{"a": 2}\n')
    assert [row for _, row in rows_in("memory://bucket/rows.jsonl")] == [{"a": 1}, {"a": 2}]
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(b'{"a": 1}\n'))
    assert rows_in(tmp_path / "rows.jsonl.gz") == [("rows.jsonl.gz:1", {"a": 1})]
    broken = error_in(tmp_path, gzip.compress(b'{"a": 1}\n' * 99)[:-9], "cut.jsonl.gz")
    assert "cannot read dataset.file_dataset_path=" in broken


def test_streaming_reads_no_further_than_asked(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\nnot json\n')
    assert next(read_rows(SourceSpec(file_dataset_path=str(path)))) == ("rows.jsonl:1", {"a": 1})


def test_missing_file_names_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").touch()
    (tmp_path / "other.md").touch()
    message = error_of(SourceSpec(file_dataset_path=f"{tmp_path}/tran.jsonl"), "eval")
    assert message.startswith(f"eval.file_dataset_path={tmp_path}/tran.jsonl does not exist")
    assert f"Did you mean train.jsonl, in the same folder {tmp_path}?" in message
    message = error_of(SourceSpec(file_dataset_path=f"{tmp_path}/zzz"))
    assert f"the folder {tmp_path} has no such file" in message
    message = error_of(SourceSpec(file_dataset_path=f"{tmp_path}/no/where.jsonl"))
    assert f"there is no folder {tmp_path}/no" in message
    assert "is a folder, expected one" in error_of(SourceSpec(file_dataset_path=str(tmp_path)))


def test_missing_remote_file_and_unknown_protocol() -> None:
    with fsspec.open("memory://shelf/train.jsonl", "wb") as handle:
        handle.write(b"{}")
    message = error_of(SourceSpec(file_dataset_path="memory://shelf/trian.jsonl"))
    assert "Did you mean train.jsonl" in message
    message = error_of(SourceSpec(file_dataset_path="nosuch://x/rows.jsonl"))
    assert "cannot reach dataset.file_dataset_path=nosuch://x/rows.jsonl" in message
    assert "nosuch" in message


@pytest.mark.parametrize("content", [b"", b"\n  \n", b"[]"])
def test_empty(tmp_path: Path, content: bytes) -> None:
    message = error_in(tmp_path, content, "rows.json")
    assert f"{tmp_path}/rows.json (dataset.file_dataset_path) is empty: it has 0 rows" in message


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b'{"a": 1}\n{"a": 1,}\n', ["rows.jsonl:2: malformed JSON", "column 9", "property name"]),
        (b'{"a": 1}\n\n{"a": \n', ["rows.jsonl:3: malformed JSON", "Expecting value"]),
        (b'{"a": 1}\n[1]\n', ["rows.jsonl:2: the row is an array, expected a JSON object"]),
        (b"[1]\n", ["rows.jsonl:1: the row is an array, expected a JSON object"]),
        (b'"text"\n', ["rows.jsonl:1: the row is a string"]),
        (b"null\n", ["rows.jsonl:1: the row is null"]),
        (b"true\n", ["rows.jsonl:1: the row is a boolean"]),
        (b"4.5\n", ["rows.jsonl:1: the row is a number"]),
        (b'{"a": 1}\n{"a": "\xe9"}\n', ["rows.jsonl:2: not valid UTF-8 at byte 8", "0xe9"]),
        (b"9" * 5000 + b"\n", ["rows.jsonl:1: JSON that cannot be read"]),
        (b"[" * 200_000 + b"\n", ["rows.jsonl:1: JSON that cannot be read"]),
    ],
)
def test_broken_line(tmp_path: Path, content: bytes, expected: list[str]) -> None:
    message = error_in(tmp_path, content)
    assert "\n" not in message
    for part in expected:
        assert part in message


def test_broken_array(tmp_path: Path) -> None:
    message = error_in(tmp_path, b'[\n {"a": 1}\n {"a": 2}\n]', "rows.json")
    assert "rows.json: malformed JSON" in message
    assert "line 3, column 2" in message
    message = error_in(tmp_path, b'[{"a": 1}, 7]', "rows.json")
    assert "rows.json#2: the row is a number" in message


def test_neither_or_both() -> None:
    message = error_of(SourceSpec(), "eval")
    assert "neither eval.file_dataset_path nor eval.hf_dataset_name is set" in message
    message = error_of(SourceSpec(file_dataset_path="a", hf_dataset_name="b/c"))
    assert "dataset.file_dataset_path=a and dataset.hf_dataset_name=b/c are both set" in message
    with pytest.raises(DataError):
        read_rows(SourceSpec())  # at the call, before the first row is asked for


def test_hub_dataset_in_a_local_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "_answers", lambda _: pytest.fail("the hub is not needed"))
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "train.jsonl").write_text('{"a": 1}\n{"a": 2}\n')
    source = SourceSpec(hf_dataset_name=str(folder), cache_dir=str(tmp_path / "cache"))
    ids = [f"{folder}:train:1", f"{folder}:train:2"]
    assert list(read_rows(source)) == list(zip(ids, [{"a": 1}, {"a": 2}], strict=True))
    wrong = SourceSpec(hf_dataset_name=str(folder), split="tset", cache_dir=str(tmp_path / "cache"))
    message = error_of(wrong, "eval")
    assert "tset" in message
    assert "['train']" in message
    assert "eval.split" in message


@pytest.mark.parametrize("asked_offline", [False, True])
def test_hub_without_network_fails_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked_offline: bool
) -> None:
    import datasets
    import huggingface_hub

    monkeypatch.setattr(sources, "_answers", lambda _: False)
    monkeypatch.delenv("HF_DATASETS_OFFLINE", raising=False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    if asked_offline:
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", asked_offline)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", asked_offline)
    started = time.monotonic()
    message = error_of(SourceSpec(hf_dataset_name="no/such", cache_dir=str(tmp_path)))
    assert time.monotonic() - started < 5
    assert "dataset.hf_dataset_name=no/such" in message
    assert "Hub cannot be reached" in message
    assert "Set dataset.file_dataset_path" in message
    assert ("HF_HUB_OFFLINE is set" in message) == asked_offline
    assert asked_offline == datasets.config.HF_HUB_OFFLINE
    assert asked_offline == huggingface_hub.constants.HF_HUB_OFFLINE


def test_probe_of_a_host_that_does_not_exist() -> None:
    assert not sources._answers("http://127.0.0.1:9")
