"""Rows come in order with ids a person can look up; what cannot be read is one clear message."""

from __future__ import annotations

import gzip
import io
import json
import os
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFile, MemoryFileSystem

from torchprime.data.files import open_source as sources
from torchprime.data.files.open_source import expected_rows, read_rows, source_fingerprint
from torchprime.data.files.record import Rejection
from torchprime.data.files.source import SourceSpec
from torchprime.errors import DataError


def write(url: str, content: bytes) -> None:
    fs, inner = fsspec.core.url_to_fs(url)
    fs.makedirs(inner.rpartition("/")[0], exist_ok=True)
    fs.pipe_file(inner, content)


def rows_in(path: object, section: str = "dataset") -> list[tuple[str, Any]]:
    return list(read_rows(SourceSpec(file_dataset_path=str(path), section=section)))


def error_of(source: SourceSpec, section: str = "dataset") -> str:
    with pytest.raises(DataError) as caught:
        list(read_rows(replace(source, section=section)))
    return str(caught.value)


def error_in(folder: Path, content: bytes, name: str = "rows.jsonl") -> str:
    (folder / name).write_bytes(content)
    return error_of(SourceSpec(file_dataset_path=str(folder / name)))


@pytest.mark.parametrize("name", ["rows.json", "rows.txt"])
def test_array_or_lines_by_content(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text(json.dumps([{"a": 1}, {"a": 2}], indent=2))
    assert rows_in(path) == [(f"{name}#1", {"a": 1}), (f"{name}#2", {"a": 2})]
    path.write_text('{"a": 1}\n{"a": 2}\n')
    assert rows_in(path) == [(f"{name}:1", {"a": 1}), (f"{name}:2", {"a": 2})]


def test_fsspec_url_and_compressed_file(tmp_path: Path) -> None:
    write("memory://bucket/rows.jsonl", b'{"a": 1}\n{"a": 2}\n')
    assert [row for _, row in rows_in("memory://bucket/rows.jsonl")] == [{"a": 1}, {"a": 2}]
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(b'{"a": 1}\n'))
    assert rows_in(tmp_path / "rows.jsonl.gz") == [("rows.jsonl.gz:1", {"a": 1})]
    broken = error_in(tmp_path, gzip.compress(b'{"a": 1}\n' * 99)[:-9], "cut.jsonl.gz")
    assert f"cannot read dataset.file_dataset_path={tmp_path}/cut.jsonl.gz: EOFError" in broken


def write_tree(root: str) -> None:
    """Eight files below root://tree, of which a folder's rows are those of four."""
    table = pa.Table.from_pylist([{"a": "p1"}, {"a": "p2"}])
    parquet = io.BytesIO()
    pq.write_table(table, parquet)
    files = {
        "b.jsonl": b'{"a": "b1"}\n',
        "a/z.csv": b"a\nz2\n",
        "a/deep/x.json.gz": gzip.compress(b'[{"a": "x1"}]', mtime=0),
        "a/p.parquet": parquet.getvalue(),
        "README.md": b"# not rows",
        ".hidden.jsonl": b'{"a": "hidden"}\n',
        ".cache/b.jsonl": b'{"a": "hidden"}\n',
        "part-0": b'{"a": "part"}\n',
    }
    for name, content in files.items():
        write(f"{root}/tree/{name}", content)


TREE_ROWS = [
    ("a/deep/x.json.gz#1", {"a": "x1"}),
    ("a/p.parquet#1", {"a": "p1"}),
    ("a/p.parquet#2", {"a": "p2"}),
    ("a/z.csv:2", {"a": "z2"}),
    ("b.jsonl:1", {"a": "b1"}),
]


@pytest.fixture(params=["local", "memory"])
def tree(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The address of the folder that holds `tree`, on a disk and on a store that is none."""
    root = str(tmp_path) if request.param == "local" else f"memory://{tmp_path.name}-{uuid4()}"
    write_tree(root)
    return root


def test_folder(tree: str) -> None:
    assert rows_in(f"{tree}/tree") == TREE_ROWS
    assert rows_in(f"{tree}/tree/") == TREE_ROWS


@pytest.mark.parametrize(
    ("pattern", "ids"),
    [
        ("tree/*.jsonl", ["b.jsonl:1"]),
        ("tree/a/*", ["p.parquet#1", "p.parquet#2", "z.csv:2"]),
        ("tree/**/*.[cj]s*", ["a/deep/x.json.gz#1", "a/z.csv:2", "b.jsonl:1"]),
        ("tre?/b.jsonl", ["tree/b.jsonl:1"]),
        ("tree/part-*", ["part-0:1"]),
    ],
)
def test_glob(tree: str, pattern: str, ids: list[str]) -> None:
    assert [row_id for row_id, _ in rows_in(f"{tree}/{pattern}")] == ids


def test_glob_takes_each_file_it_matches(tree: str) -> None:
    write(f"{tree}/tree/notes.md", b"# not rows")
    message = error_of(SourceSpec(file_dataset_path=f"{tree}/tree/*"))
    assert "notes.md: the format is unknown" in message
    assert ".parquet" in message


def test_folder_and_glob_without_rows(tmp_path: Path) -> None:
    (tmp_path / "rows.txt").write_text('{"a": 1}')
    message = error_of(SourceSpec(file_dataset_path=str(tmp_path)), "eval")
    assert f"eval.file_dataset_path={tmp_path} is a folder without a file of a known" in message
    assert ".jsonl .ndjson .json" in message
    message = error_of(SourceSpec(file_dataset_path=f"{tmp_path}/*.jsonl"), "eval")
    assert f"eval.file_dataset_path={tmp_path}/*.jsonl matches no file" in message
    assert rows_in(f"{tmp_path}/*.txt") == [("rows.txt:1", {"a": 1})]


def test_file_whose_name_holds_a_globs_characters(tmp_path: Path) -> None:
    (tmp_path / "rows[1].jsonl").write_text('{"a": 1}\n')
    (tmp_path / "rows1.jsonl").write_text('{"a": 2}\n')
    assert rows_in(tmp_path / "rows[1].jsonl") == [("rows[1].jsonl:1", {"a": 1})]


def test_fault_in_one_of_several_files(tree: str) -> None:
    write(f"{tree}/tree/a/z.csv", b'a\n"')
    assert "a/z.csv:2: the record" in error_of(SourceSpec(file_dataset_path=f"{tree}/tree"))
    write(f"{tree}/tree/a/deep/x.json.gz", b"[]")
    message = error_of(SourceSpec(file_dataset_path=f"{tree}/tree"))
    assert f"{tree}/tree (a/deep/x.json.gz): BadGzipFile" in message


def test_broken_rows_are_rejections(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1,}\n{"a": 2}\n{"a": "\xe9"}\n[]\n')
    source = SourceSpec(file_dataset_path=str(path), name="part")
    found = list(read_rows(source))
    assert [row_id for row_id, _ in found] == [f"part/rows.jsonl:{i}" for i in (1, 2, 3, 4)]
    rejections = [record for _, record in found if isinstance(record, Rejection)]
    assert [(r.row_id, r.reason) for r in rejections] == [
        ("part/rows.jsonl:1", "malformed JSON"),
        ("part/rows.jsonl:3", "not valid UTF-8"),
        ("part/rows.jsonl:4", "not a JSON object"),
    ]


class Flaky(MemoryFileSystem):
    """A store that fails in its own way, as those in the cloud do, at one of its calls."""

    protocol = "flaky"
    fails_at = ""

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return "/" + path.removeprefix("flaky://").strip("/")

    def info(self, path: str, **kwargs: Any) -> Any:
        if self.fails_at == "info":
            raise LookupError("store: 403")
        return super().info(path, **kwargs)

    def _open(self, path: str, *args: Any, **kwargs: Any) -> Any:
        if self.fails_at == "open":
            raise LookupError("store: 403")
        handle = super()._open(path, *args, **kwargs)
        if self.fails_at == "read":
            handle = SimpleNamespace(read=self._fail, seekable=lambda: False, close=lambda: None)
        return handle

    def _fail(self, size: int) -> bytes:
        raise LookupError("store: 403")

    def ukey(self, path: str) -> str:
        return self._fail(0).hex() if self.fails_at == "ukey" else super().ukey(path)


@pytest.fixture
def flaky() -> Iterator[type[Flaky]]:
    fsspec.register_implementation("flaky", Flaky, clobber=True)
    Flaky.store["/shelf/rows.jsonl"] = MemoryFile(Flaky(), "/shelf/rows.jsonl", b'{"a": 1}\n')
    Flaky.fails_at = ""
    yield Flaky
    del Flaky.store["/shelf/rows.jsonl"]


def test_what_a_remote_store_raises(flaky: type[Flaky], monkeypatch: pytest.MonkeyPatch) -> None:
    source = SourceSpec(file_dataset_path="flaky://shelf/rows.jsonl")
    assert list(read_rows(source)) == [("rows.jsonl:1", {"a": 1})]
    for call in ("info", "open", "read"):
        monkeypatch.setattr(flaky, "fails_at", call)
        message = error_of(source, "eval")
        assert "eval.file_dataset_path=flaky://shelf/rows.jsonl: LookupError: " in message
        assert "store: 403" in message
    for call in ("info", "ukey"):
        monkeypatch.setattr(flaky, "fails_at", call)
        with pytest.raises(DataError, match="store: 403"):
            source_fingerprint(source)


def test_streaming_opens_no_file_before_its_turn(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n')
    (tmp_path / "b.json").write_text("[broken")
    rows = read_rows(SourceSpec(file_dataset_path=str(tmp_path)))
    assert next(rows) == ("a.jsonl:1", {"a": 1})
    with pytest.raises(DataError, match=r"b\.json: malformed JSON"):
        next(rows)


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
    message = error_of(SourceSpec(file_dataset_path=f"{tmp_path}/train.jsonl/x.jsonl"))
    assert "does not exist" in message


def test_missing_remote_file_and_unknown_protocol() -> None:
    write("memory://shelf/train.jsonl", b"{}")
    message = error_of(SourceSpec(file_dataset_path="memory://shelf/trian.jsonl"))
    assert "Did you mean train.jsonl" in message
    message = error_of(SourceSpec(file_dataset_path="nosuch://x/rows.jsonl"))
    assert "cannot reach dataset.file_dataset_path=nosuch://x/rows.jsonl" in message
    assert "nosuch" in message


@pytest.mark.parametrize("content", [b"", b"\n  \n", b"[]"])
def test_empty(tmp_path: Path, content: bytes) -> None:
    message = error_in(tmp_path, content, "rows.json")
    assert f"{tmp_path}/rows.json (dataset.file_dataset_path) is empty: it has 0 rows" in message


def test_fingerprint_of_files_is_that_of_their_content(tree: str) -> None:
    source = SourceSpec(file_dataset_path=f"{tree}/tree")
    fs, inner = fsspec.core.url_to_fs(f"{tree}/tree")
    before = source_fingerprint(source)
    assert re.fullmatch("[0-9a-f]{64}", before)
    assert source_fingerprint(replace(source, split=None, cache_dir="/else")) == before
    assert source_fingerprint(replace(source, name="part")) != before

    if "local" in fs.protocol:
        os.utime(f"{inner}/b.jsonl", (1, 1))
    fs.pipe_file(f"{inner}/README.md", b"changed, and no source of rows")
    assert source_fingerprint(source) == before
    write_tree(f"{tree}/copy")
    assert source_fingerprint(SourceSpec(file_dataset_path=f"{tree}/copy/tree")) == before

    seen = {before}
    fs.pipe_file(f"{inner}/b.jsonl", b'{"a": "b2"}\n')  # of the same length
    seen.add(source_fingerprint(source))
    fs.mv(f"{inner}/b.jsonl", f"{inner}/c.jsonl")
    seen.add(source_fingerprint(source))
    fs.rm(f"{inner}/c.jsonl")
    seen.add(source_fingerprint(source))
    seen.add(source_fingerprint(SourceSpec(file_dataset_path=f"{tree}/tree/a/*.csv")))
    assert len(seen) == 5


def test_fingerprint_beyond_one_piece(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    source = SourceSpec(file_dataset_path=str(path))
    seen = set()
    for last in b"ab":
        path.write_bytes(b" " * (2 * sources.HASH_BYTES) + bytes([last]))
        seen.add(source_fingerprint(source))
    assert len(seen) == 2


def test_fingerprint_on_a_remote_store_reads_no_content(
    flaky: type[Flaky], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flaky, "fails_at", "open")
    source = SourceSpec(file_dataset_path="flaky://shelf/rows.jsonl")
    before = source_fingerprint(source)
    assert source_fingerprint(source) == before
    monkeypatch.setattr(flaky, "ukey", lambda self, path: "another version")
    assert source_fingerprint(source) != before


def test_expected_rows_are_about_right(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text("".join(f'{{"text": "{n:06}"}}\n' for n in range(90_000)))
    found = expected_rows(SourceSpec(file_dataset_path=str(tmp_path)))
    assert found == pytest.approx(180_000, rel=1e-3)
    with gzip.open(tmp_path / "c.jsonl.gz", "wt") as packed:
        packed.write('{"text": "x"}\n')
    assert expected_rows(SourceSpec(file_dataset_path=str(tmp_path))) is None
