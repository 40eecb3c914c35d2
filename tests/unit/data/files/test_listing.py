"""Folders that `save_to_disk` wrote are read as the library reads them, through both keys."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import fsspec
import pytest

from torchprime.data.files.open_source import read_rows, source_fingerprint
from torchprime.data.files.source import SourceSpec
from torchprime.errors import DataError

ROWS: list[dict[str, Any]] = [
    {"prompt": f"p{i}", "n": {"x": i, "y": None if i % 2 else "y"}} for i in range(10)
]
READ = [{**row, "n": {k: v for k, v in row["n"].items() if v is not None}} for row in ROWS]
KEYS = ("file_dataset_path", "hf_dataset_name")


def source_of(folder: object, key: str = KEYS[0], **more: Any) -> SourceSpec:
    return SourceSpec(**{key: str(folder), **more})


def records_of(source: SourceSpec, section: str = "dataset") -> list[Any]:
    return [record for _, record in read_rows(replace(source, section=section))]


def error_of(source: SourceSpec, section: str = "dataset") -> str:
    with pytest.raises(DataError) as caught:
        records_of(source, section)
    return str(caught.value)


@pytest.fixture
def dataset() -> datasets.Dataset:
    return datasets.Dataset.from_list(ROWS)


@pytest.fixture
def splits(tmp_path: Path, dataset: datasets.Dataset) -> Path:
    """A saved DatasetDict: train in three files, backwards, and a split of a name of its own."""
    parts: dict[str | datasets.NamedSplit, datasets.Dataset]
    parts = {"train": dataset.select(range(9, -1, -1)), "held.out": dataset.select([3, 1])}
    datasets.DatasetDict(parts).save_to_disk(
        tmp_path / "saved", num_shards={"train": 3, "held.out": 1}
    )
    return tmp_path / "saved"


@pytest.mark.parametrize("key", KEYS)
def test_a_saved_dataset(tmp_path: Path, dataset: datasets.Dataset, key: str) -> None:
    folder = tmp_path / "saved"
    dataset.save_to_disk(folder, num_shards=3)
    found = list(read_rows(source_of(folder, key)))
    assert [record for _, record in found] == READ
    assert [row_id for row_id, _ in found][3:5] == [
        "data-00000-of-00003.arrow#4",
        "data-00001-of-00003.arrow#1",
    ]
    # Its order is the list's, and what is not listed is no part of it.
    state = json.loads((folder / "state.json").read_text())
    state["_data_files"].reverse()
    (folder / "state.json").write_text(json.dumps(state))
    shutil.copy(folder / "data-00000-of-00003.arrow", folder / "cache-12.arrow")
    (folder / "dataset_infos.json").write_text('{"a": 1}')
    expected = datasets.load_from_disk(folder)["prompt"][:]
    assert expected[0] == "p7"
    assert [record["prompt"] for record in records_of(source_of(folder, key))] == expected


@pytest.mark.parametrize("key", KEYS)
def test_a_split_of_a_saved_dict(splits: Path, key: str) -> None:
    assert records_of(source_of(splits, key)) == READ[::-1]
    held_out = source_of(splits, key, split="held.out", name="part", section="eval")
    assert list(read_rows(held_out)) == [
        ("part/held.out/data-00000-of-00001.arrow#1", READ[3]),
        ("part/held.out/data-00000-of-00001.arrow#2", READ[1]),
    ]
    message = error_of(source_of(splits, key, split="test"), "eval")
    assert f"eval.split=test selects no file of eval.{key}={splits}" in message
    assert "the splits there are held.out, train" in message
    # One of its splits is a data set, as is one in a folder of several.
    assert records_of(source_of(splits / "held.out", key)) == [READ[3], READ[1]]
    (splits / "dataset_dict.json").unlink()
    shutil.move(splits / "held.out", splits / "test")
    assert records_of(source_of(splits, split="test")) == [READ[3], READ[1]]


def test_a_split_has_to_be_chosen_and_to_be_there(splits: Path) -> None:
    assert "held.out, train, and eval.split is not set" in error_of(
        source_of(splits, split=None), "eval"
    )
    (splits / "rows.jsonl").write_text("{}")
    assert "without the name of a split: rows.jsonl" in error_of(source_of(splits))
    whole = source_of(splits / "train", split="test")
    assert "eval.split=test is set, but" in error_of(whole, "eval")
    assert "is one saved data set, which has no splits" in error_of(whole, "eval")
    named = source_of(splits, KEYS[1], hf_dataset_config_name="main")
    assert "Set dataset.hf_dataset_config_name=null" in error_of(named)


def test_a_dataset_that_says_its_split(tmp_path: Path, dataset: datasets.Dataset) -> None:
    saved = datasets.Dataset.from_list(ROWS, split=datasets.Split.TEST)
    saved.save_to_disk(tmp_path / "saved")
    for split in ("train", "test", None):
        assert records_of(source_of(tmp_path / "saved", split=split)) == READ
    assert "has no splits" in error_of(source_of(tmp_path / "saved", split="dev"))


def test_files_that_are_missing_or_only_chosen_from(splits: Path) -> None:
    folder = splits / "train"
    state = json.loads((folder / "state.json").read_text())
    for key in ("_indices_files", "_indices_data_files"):  # two generations of the library
        chosen = {**state, key: [{"filename": "indices.arrow"}]}
        (folder / "state.json").write_text(json.dumps(chosen))
        for source in (source_of(folder), source_of(splits)):
            assert "flatten_indices() before save_to_disk" in error_of(source)
    for files in ([{"filename": "../held.out/data-00000-of-00001.arrow"}], [{"filename": "x"}]):
        (folder / "state.json").write_text(json.dumps({**state, "_data_files": files}))
        assert "lists" in error_of(source_of(folder))
        assert "which is not there" in error_of(source_of(folder))
    (folder / "state.json").write_text("{")
    assert "state.json is not JSON" in error_of(source_of(folder))


def test_a_saved_folder_on_a_store(splits: Path) -> None:
    fs = fsspec.filesystem("memory")
    fs.put(str(splits), "/shelf/saved", recursive=True)
    assert records_of(source_of("memory://shelf/saved")) == READ[::-1]
    fs.rm("/shelf", recursive=True)


def test_the_fingerprint_of_a_saved_split(splits: Path) -> None:
    sources = [source_of(splits, key) for key in KEYS]
    before = source_fingerprint(sources[0])
    assert source_fingerprint(sources[1]) == before
    (splits / "held.out" / "data-00000-of-00001.arrow").write_bytes(b"")
    assert source_fingerprint(sources[0]) == before
    (splits / "train" / "data-00000-of-00003.arrow").write_bytes(b"")
    assert source_fingerprint(sources[0]) != before


def test_the_example_that_was_refused(shared_dir: Path) -> None:
    folder = shared_dir / "cases/data/saved_to_disk"
    saved = datasets.load_from_disk(folder)
    assert isinstance(saved, datasets.Dataset)
    expected = saved.to_list()
    for key in KEYS:
        assert records_of(source_of(folder, key)) == expected
