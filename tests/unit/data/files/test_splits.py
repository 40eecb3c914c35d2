"""The splits that names give are those the hub gives; what it would leave out is an error here."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from uuid import uuid4

import pytest
from datasets.data_files import get_data_patterns, resolve_pattern
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import given, settings
from hypothesis import strategies as st

from torchprime.data.files.open_source import read_rows, source_fingerprint
from torchprime.data.files.source import SourceSpec
from torchprime.data.files.splits import SplitKey, splits_of
from torchprime.errors import DataError

LAYOUTS: dict[str, list[str]] = {
    "one file": ["rows.jsonl"],
    "no names": ["a.jsonl", "sub/b.jsonl", "trainer.jsonl", "contest/x.jsonl", "Train.jsonl"],
    "files": ["train.jsonl", "validation.jsonl", "test.jsonl"],
    "other keywords": ["training.csv", "dev.csv", "evaluation.csv"],
    "shards": ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet", "val-0.parquet"],
    "between separators": ["my_train.jsonl", "rows dev 2.jsonl", "x.eval.jsonl", "7test7.jsonl"],
    "in a folder": ["data/train.jsonl", "data/test.jsonl"],
    "folders": ["train/a.jsonl", "train/deep/b.jsonl", "valid/a.jsonl"],
    "folders' names": ["my-train-v2/a.jsonl", "en.testing/a.jsonl"],
    "a folder wins over a file": ["train/test.jsonl", "dev/train.jsonl"],
    "custom splits": ["data/easy-00000-of-00001.parquet", "data/hard.x-00000-of-00001.parquet"],
    "custom beside known": ["data/train-00000-of-00001.parquet", "data/odd-00000-of-00001.parquet"],
    "custom names not in data/": ["x/odd-00000-of-00001.parquet", "odd-00000-of-00001.parquet"],
    "a folder's name and a file's": ["train/a.jsonl", "validation.jsonl"],
    "named and not": ["train.jsonl", "rows.jsonl"],
    "shards and not": ["data/train-00000-of-00001.parquet", "train.jsonl"],
    "two splits": ["train/test/a.jsonl", "train/b.jsonl"],
    "two splits in a file": ["train_dev.jsonl", "train.jsonl"],
    "compressed": ["train.jsonl.gz", "test.jsonl.zst"],
}


def of_the_hub(names: list[str]) -> list[set[str]]:
    """For each file the splits that the datasets library would read it into."""
    root = f"memory://{uuid4()}"
    fs = MemoryFileSystem()
    paths = [f"{root}/{name}" for name in names]
    for path in paths:
        fs.pipe_file(path, b"{}")
    patterns = get_data_patterns(root)
    found = {
        split: {path for each in globs for path in _resolved(each, root)}
        for split, globs in patterns.items()
    }
    splits = [
        {split for split, files in found.items() if fs._strip_protocol(path) in files}
        for path in paths
    ]
    fs.rm(root, recursive=True)
    # The library takes files without a split's name as train: its last pattern is any file.
    return [set() for _ in names] if patterns == {"train": ["**"]} else splits


def _resolved(pattern: str, root: str) -> list[str]:
    try:
        return [MemoryFileSystem._strip_protocol(path) for path in resolve_pattern(pattern, root)]
    except FileNotFoundError:
        return []


@pytest.mark.parametrize("layout", LAYOUTS)
def test_splits_are_those_of_the_hub(layout: str) -> None:
    assert splits_of(LAYOUTS[layout]) == of_the_hub(LAYOUTS[layout])


PIECES = st.sampled_from(
    ["train", "training", "dev", "val", "test", "eval", "x", "data", "-", "_", ".", "7", " "]
)
PARTS = st.lists(PIECES, min_size=1, max_size=4).map("".join)
NAMES = st.builds(
    lambda folders, file: "/".join([*folders, file + ".jsonl"]), st.lists(PARTS, max_size=2), PARTS
).filter(lambda name: not re.search(r"(^|/)(__|[ .])|[ .](/|$)", name))


@settings(max_examples=25, deadline=None)
@given(st.lists(NAMES, min_size=1, max_size=4, unique=True))
def test_random_names_too(names: list[str]) -> None:
    # A name cannot be a file and a folder.
    names = [n for n in names if not any(other.startswith(n + "/") for other in names)]
    assert splits_of(names) == of_the_hub(names)


# Reading ----------------------------------------------------------------------------------------


def make(folder: Path, names: list[str]) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f'{{"file": "{name}"}}\n')
    return folder


def files_read(path: object, split: str | None = "train", section: str = "dataset") -> list[str]:
    source = SourceSpec(file_dataset_path=str(path), split=split, section=section)
    return [record["file"] for _, record in read_rows(source)]  # type: ignore[index]


def error_of(path: object, split: str | None = "train", section: str = "dataset") -> str:
    with pytest.raises(DataError) as caught:
        files_read(path, split, section)
    return str(caught.value)


def test_only_the_files_of_the_split_are_read(tmp_path: Path) -> None:
    make(tmp_path, ["train-0.jsonl", "train-1.jsonl", "validation.jsonl", "test.jsonl"])
    assert files_read(tmp_path) == ["train-0.jsonl", "train-1.jsonl"]
    assert files_read(tmp_path, "validation") == ["validation.jsonl"]
    assert files_read(tmp_path, "dev") == ["validation.jsonl"], "a keyword of the same split"
    assert files_read(tmp_path, "test", "eval") == ["test.jsonl"]
    assert files_read(f"{tmp_path}/t*.jsonl", "test") == ["test.jsonl"]
    ids = [row_id for row_id, _ in read_rows(SourceSpec(file_dataset_path=str(tmp_path)))]
    assert ids == ["train-0.jsonl:1", "train-1.jsonl:1"]


def test_a_split_that_selects_nothing(tmp_path: Path) -> None:
    make(tmp_path, ["test/a.jsonl", "validation/a.jsonl"])
    message = error_of(tmp_path)
    assert f"dataset.split=train selects no file of dataset.file_dataset_path={tmp_path}" in message
    assert "the splits there are test, validation. Set dataset.split to one of them" in message
    message = error_of(f"{tmp_path}/v*/*", "test", "eval")
    assert "eval.split=test selects no file" in message
    assert "are validation." in message


def test_held_out_rows_are_never_the_training_rows_by_default(tmp_path: Path) -> None:
    make(tmp_path, ["train.jsonl", "test.jsonl"])
    message = error_of(tmp_path, None, "eval")
    assert "eval.split is not set. Set eval.split to one of them" in message
    assert "of the splits test, train" in message
    (tmp_path / "train.jsonl").unlink()
    assert "files of the splits test, and eval.split is not set" in error_of(tmp_path, None, "eval")
    # Files that the user named, all of one split, need no split key.
    assert files_read(f"{tmp_path}/test*", None, "eval") == ["test.jsonl"]
    assert files_read(tmp_path / "test.jsonl", None, "eval") == ["test.jsonl"]


def test_a_split_that_nothing_uses(tmp_path: Path) -> None:
    make(tmp_path, ["a.jsonl", "sub/b.csv", "c.json", "test.jsonl"])
    for path in (tmp_path / "a.jsonl", tmp_path / "sub", tmp_path / "c.json", f"{tmp_path}/*.json"):
        message = error_of(path, "test", "eval")
        assert "eval.split=test is set, but" in message
        assert "Set eval.split=null" in message
        assert "Set dataset.split=train" in error_of(path, "test")
        assert error_of(path, "test", "eval").count("\n") == 0
    assert files_read(tmp_path / "a.jsonl", None, "eval") == ["a.jsonl"]
    # A single file is what its own name says, whatever the default, and may be called so.
    assert files_read(tmp_path / "test.jsonl") == ["test.jsonl"]
    assert files_read(tmp_path / "test.jsonl", "test", "eval") == ["test.jsonl"]
    assert "eval.split=dev is set" in error_of(tmp_path / "test.jsonl", "dev", "eval")


def test_lists_of_documents_are_splits_too(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text('{"train": [{"file": "a"}], "valid": [{"file": "b"}]}')
    for path in (tmp_path, tmp_path / "rows.json", f"{tmp_path}/r*"):
        assert files_read(path) == ["a"]
        assert files_read(path, "valid") == files_read(path, "validation") == ["b"]
        assert "train, valid, and dataset.split=test is none" in error_of(path, "test")
        assert "train, valid, and eval.split is not set" in error_of(path, None, "eval")
    (tmp_path / "rows.json").write_text('{"rows": [{"file": "a"}]}')
    assert files_read(tmp_path) == ["a"]
    assert "has only the list rows" in error_of(tmp_path, "valid")
    make(tmp_path, ["more.jsonl"])
    (tmp_path / "rows.json").write_text('{"dev": [{"file": "a"}]}')
    assert "more.jsonl has no splits" in error_of(tmp_path, "dev")


@pytest.mark.parametrize(
    ("layout", "problem", "named"),
    [
        ("named and not", "there are files without the name of a split", "rows.jsonl"),
        ("a folder's name and a file's", "without the name of a split", "validation.jsonl"),
        ("shards and not", "without the name of a split", ": train.jsonl"),
        ("two splits", "say train and another split", "train/test/a.jsonl"),
        ("two splits in a file", "say train and another split", "train_dev.jsonl"),
    ],
)
def test_names_that_do_not_go_together(
    tmp_path: Path, layout: str, problem: str, named: str
) -> None:
    message = error_of(make(tmp_path, LAYOUTS[layout]))
    assert problem in message
    assert named in message
    assert "give a glob" in message


def test_metadata_is_never_rows(tmp_path: Path) -> None:
    make(tmp_path, ["train.jsonl", "train/readme.jsonl"])
    make(tmp_path, [".cache/train.jsonl", "__MACOSX/train.jsonl"])
    metadata = ["dataset_infos.json", "dataset_info.json", "config.json", "README.md", "LICENSE"]
    make(tmp_path, [*metadata, ".gitattributes", "README.jsonl", "sub/dataset_info.json"])
    assert files_read(f"{tmp_path}/*") == ["train.jsonl"]
    assert files_read(f"{tmp_path}/train/*") == ["train/readme.jsonl"]
    (tmp_path / "train/readme.jsonl").unlink()
    assert files_read(tmp_path) == ["train.jsonl"]
    # A file that the user named is read.
    assert files_read(tmp_path / "config.json") == ["config.json"]


def test_the_fingerprint_is_that_of_the_files_that_are_read(tmp_path: Path) -> None:
    make(tmp_path, ["train.jsonl", "test.jsonl"])
    train = SourceSpec(file_dataset_path=str(tmp_path))
    test = replace(train, split="test", section="eval")
    before = source_fingerprint(train), source_fingerprint(test)
    assert before[0] != before[1]
    (tmp_path / "test.jsonl").write_text('{"a": 2}\n')
    after = source_fingerprint(train), source_fingerprint(test)
    assert after[0] == before[0]
    assert after[1] != before[1]
    with pytest.raises(DataError, match="eval.split is not set"):
        source_fingerprint(replace(test, split=None))


def test_default_asks_for_nothing() -> None:
    assert [SplitKey(name).asks for name in ("train", None, "test")] == [False, False, True]
