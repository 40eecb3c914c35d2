"""Datasets through the hub's library: rows, ids, fingerprints, and no waiting for no network."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest

from torchprime.data.files import hub as hub_rows
from torchprime.data.files.open_source import read_rows, source_fingerprint
from torchprime.data.files.source import SourceSpec
from torchprime.errors import DataError


def error_of(source: SourceSpec, section: str = "dataset") -> str:
    with pytest.raises(DataError) as caught:
        list(read_rows(replace(source, section=section)))
    return str(caught.value)


def test_hub_dataset_in_a_local_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_rows, "_answers", lambda _: pytest.fail("the hub is not needed"))
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "train.jsonl").write_text('{"a": 1}\n{"a": 2}\n')
    source = SourceSpec(hf_dataset_name=str(folder), cache_dir=str(tmp_path / "cache"))
    ids = [f"{folder}:train:1", f"{folder}:train:2"]
    assert list(read_rows(source)) == list(zip(ids, [{"a": 1}, {"a": 2}], strict=True))
    named = replace(source, name="part")
    assert [row_id for row_id, _ in read_rows(named)] == [f"part/{row_id}" for row_id in ids]
    wrong = SourceSpec(hf_dataset_name=str(folder), split="tset", cache_dir=str(tmp_path / "cache"))
    message = error_of(wrong, "eval")
    assert "tset" in message
    assert "['train']" in message
    assert "eval.split" in message


@pytest.mark.parametrize("asked_offline", [False, True])
def test_hub_without_network_fails_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked_offline: bool
) -> None:
    import datasets.config
    import huggingface_hub

    monkeypatch.setattr(hub_rows, "_answers", lambda _: False)
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
    assert not hub_rows._answers("http://127.0.0.1:9")


def test_fingerprint_of_a_hub_dataset(tmp_path: Path) -> None:
    seen = set()
    for content in ('{"a": 1}\n', '{"a": 2}\n'):
        folder = tmp_path / "set"
        folder.mkdir(exist_ok=True)
        for split in ("train", "test"):
            (folder / f"{split}.jsonl").write_text(content)
        for split in ("train", "test"):
            source = SourceSpec(
                hf_dataset_name=str(folder), split=split, cache_dir=str(tmp_path / "cache")
            )
            seen.add(source_fingerprint(source))
            assert source_fingerprint(source) in seen
            assert list(read_rows(source))[0][1] == json.loads(content)
    assert len(seen) == 4
