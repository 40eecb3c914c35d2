"""An export at a URL is whole or not there: by the bytes, and by the store's own listing."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from read_only import make_read_only

from torchprime.checkpoint.places import INCOMPLETE, ExportPlace, UnsentError, UrlPlace
from torchprime.checkpoint.proof.certificate import CERTIFICATE
from torchprime.checkpoint.room import Need, require_room
from torchprime.checkpoint.run.open_storage import open_storage
from torchprime.checkpoint.run.storage import Storage
from torchprime.checkpoint.run.url_storage import UrlStorage
from torchprime.errors import CheckpointError

FILES = {
    "config.json": b"{}",
    "model.safetensors": bytes(range(256)) * 40_000,
    "tokenizer.json": b"[]",
    "additional_chat_templates/tools.jinja": b"{{ tools }}",
    CERTIFICATE: b'{"files": {}}',
}


# The fixture `storage` without its folder; a real store can be named in the environment.
URLS = ["memory:/", *filter(None, [os.environ.get("TORCHPRIME_TEST_STORE")])]
at_urls = pytest.mark.parametrize("storage", URLS, indirect=True)


@pytest.fixture
def store(storage: Storage) -> UrlStorage:
    assert isinstance(storage, UrlStorage)
    return storage


@pytest.fixture
def place(store: UrlStorage, tmp_path: Path) -> UrlPlace:
    found = ExportPlace.of(store.url, tmp_path / "to_send")
    assert isinstance(found, UrlPlace)
    return found


def write(place: ExportPlace) -> None:
    with place.folder() as folder:
        for name, content in FILES.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)


def listing(store: UrlStorage) -> set[str]:
    store._fs.invalidate_cache()
    found = store._fs.find(store._path) if store._fs.exists(store._path) else []
    return {path.removeprefix(f"{store._path}/") for path in found}


@at_urls
def test_what_is_sent_is_what_was_made(
    store: UrlStorage, place: UrlPlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[str] = []
    plain = UrlStorage.send

    def send(self: UrlStorage, path: Path, name: str) -> None:
        assert not place.is_there(), "nothing comes after the certificate"
        plain(self, path, name)
        sent.append(name)

    monkeypatch.setattr(UrlStorage, "send", send)
    assert not place.is_there()
    write(place)
    assert place.is_there() and sent[-2:] == ["config.json", CERTIFICATE]
    assert listing(store) == set(FILES)
    for name, content in FILES.items():
        assert store.read_bytes(name) == content == (place.local / name).read_bytes()
    place.discard()
    assert not place.local.exists()
    with pytest.raises(CheckpointError, match="already holds .* never mixed"):
        write(place)


@at_urls
@pytest.mark.parametrize("fails_at", ["tokenizer.json", "config.json", CERTIFICATE])
def test_a_failure_leaves_nothing_there_and_says_how_to_send(
    store: UrlStorage, place: UrlPlace, monkeypatch: pytest.MonkeyPatch, fails_at: str
) -> None:
    plain = UrlStorage.send

    def send(self: UrlStorage, path: Path, name: str) -> None:
        if name == fails_at:
            raise CheckpointError("no network")
        plain(self, path, name)

    monkeypatch.setattr(UrlStorage, "send", send)
    with pytest.raises(UnsentError) as caught:
        write(place)
    assert f"torchprime export {place.local} --out {store.url}" in str(caught.value)
    assert listing(store) == set()
    assert {p.name for p in place.local.rglob("*") if p.is_file()} == {Path(n).name for n in FILES}
    monkeypatch.undo()
    write(place)
    assert listing(store) == set(FILES)


@at_urls
def test_a_temporary_copy_does_not_stay(
    store: UrlStorage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    write(ExportPlace.of(store.url))
    assert listing(store) == set(FILES) and not list(tmp_path.iterdir())


@at_urls
def test_what_a_kill_left_is_replaced_and_what_is_not_ours_is_not(
    store: UrlStorage, place: UrlPlace
) -> None:
    store.write_bytes("model-00002-of-00002.safetensors", b"old")
    store.write_bytes(
        INCOMPLETE, json.dumps({"files": ["model-00002-of-00002.safetensors"]}).encode()
    )
    write(place)
    assert listing(store) == set(FILES)
    for name in FILES:
        store.remove_file(name)
    store.write_bytes("config.json", b"a model of someone else")
    with pytest.raises(CheckpointError, match=r"already holds 1 files \(config.json"):
        write(place)
    assert listing(store) == {"config.json"}


@at_urls
def test_names_in_the_list_of_a_kill_remove_nothing_outside(
    store: UrlStorage, place: UrlPlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A list that somebody edited: only names of files inside the export are removed."""
    outside = open_storage(f"{store.url}-beside")
    outside.write_bytes("mine", b"mine")
    store.write_bytes("old", b"old")
    beside = store.url.rpartition("/")[2]
    names = [f"../{beside}-beside/mine", "/mine", "a/../../x", "a\nb", "", ".", 7, None, "old"]
    store.write_bytes(INCOMPLETE, json.dumps({"files": names}).encode())
    removed: list[str] = []
    plain: Any = UrlStorage.remove_file

    def remove_file(self: UrlStorage, name: str) -> None:
        removed.append(name)
        plain(self, name)

    monkeypatch.setattr(UrlStorage, "remove_file", remove_file)
    write(place)
    assert removed == ["old", INCOMPLETE, INCOMPLETE]  # the last one is of this export
    assert listing(store) == set(FILES) and outside.read_bytes("mine") == b"mine"


@at_urls
@pytest.mark.parametrize("files", ["old", 7, None, {"old": 1}])
def test_a_list_of_another_type_is_refused(
    store: UrlStorage, place: UrlPlace, files: object
) -> None:
    store.write_bytes(INCOMPLETE, json.dumps({"files": files}).encode())
    with pytest.raises(CheckpointError, match="is not what torchprime writes there"):
        write(place)


@at_urls
def test_what_comes_back_otherwise_is_no_export(
    store: UrlStorage, place: UrlPlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain: Any = UrlStorage.send

    def send(self: UrlStorage, path: Path, name: str) -> None:
        if name == "model.safetensors":
            self.write_bytes(name, FILES[name][:-1] + b"!")
        else:
            plain(self, path, name)

    monkeypatch.setattr(UrlStorage, "send", send)
    with pytest.raises(
        UnsentError, match="model.safetensors is not what was sent: 10,240,000 bytes"
    ):
        write(place)
    assert not place.is_there() and listing(store) == set()


def test_a_store_that_lets_nobody_write_is_known_by_a_probe(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    storage: Any = open_storage("memory://probed/run")
    storage.probe()
    assert storage.names() == []

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError("Anonymous caller")

    monkeypatch.setattr(storage._fs, "pipe_file", refuse)
    with pytest.raises(
        CheckpointError, match="memory://probed/run can't be used.*Anonymous caller"
    ):
        ExportPlace.of("memory://probed/run").probe()


# Folders ------------------------------------------------------------------------------------------


def test_what_is_in_the_way_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "nowhere").symlink_to(tmp_path / "not there")
    for name in ("file", "file/out", "nowhere", "nowhere/out"):
        with pytest.raises(CheckpointError, match=r"(is not a folder|exists and is not)"):
            ExportPlace.of(tmp_path / name).require_new()
    ExportPlace.of(tmp_path / "deep" / "out").require_new()
    ExportPlace.of(tmp_path / "deep" / "out").probe()
    assert sorted(os.listdir(tmp_path)) == ["file", "nowhere"]


def test_a_disk_without_room_is_known_before(small_disk: Path) -> None:
    export = Need("the export", small_disk / "a" / "out", 3_000_000, 10, "A")
    checkpoint = Need("a checkpoint", small_disk / "b", 3_000_000, 10, "B")
    elsewhere = Need("records", small_disk.parent, 3_000_000, 10, "C")
    require_room([export, elsewhere])
    with pytest.raises(CheckpointError) as caught:
        require_room([export, elsewhere, checkpoint])
    assert "6.00 MB are needed" in str(caught.value) and "set A or B to another" in str(
        caught.value
    )
    subprocess.run(["mount", "-o", "remount,nr_inodes=12", str(small_disk)], check=True)
    require_room([export])
    (small_disk / "x").write_text("")
    (small_disk / "y").write_text("")
    with pytest.raises(CheckpointError, match="9 inodes left. Make room, or set A"):
        require_room([export])


def test_a_disk_that_fills_up_or_forbids_is_named(small_disk: Path) -> None:
    place = ExportPlace.of(small_disk / "out")
    full = pytest.raises(CheckpointError, match="The export to .*/out failed: no space .* --out")
    with full, place.folder() as folder:
        (folder / "model.safetensors").write_bytes(bytes(5_000_000))
    assert not list(small_disk.iterdir())
    make_read_only(small_disk)
    with pytest.raises(CheckpointError, match="can't be written to .*Read-only"):
        place.probe()
    with (
        pytest.raises(CheckpointError, match="failed: .*Read-only.*right to write"),
        place.folder(),
    ):
        pass
