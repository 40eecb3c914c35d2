"""A name from a stranger's file stays inside its folder, or is refused with its place."""

from __future__ import annotations

from pathlib import Path

import pytest

from torchprime.errors import CheckpointError
from torchprime.files.foreign_names import (
    checked_name,
    checked_path,
    fault_of,
    inside,
    path_fault_of,
)

GOOD = ["a", "model-00001-of-00002.safetensors", ".metadata", "a b", "..a", "東京", "é" * 127]
BAD = {
    "": "not a file name",
    ".": "not a file name",
    "..": "not a file name",
    "/a": "a path",
    "a/b": "a path",
    "a\\b": "a path",
    "a\x00": "control",
    "a\nb": "control",
    "\x1b[2J": "control",
    "a\u202eb": "control characters or text-direction marks",
    "\u2028": "control",
    "\ud800": "control",
    "é" * 128: "more than 255 bytes",
}


@pytest.mark.parametrize("name", GOOD)
def test_plain_names_are_names(name: str, tmp_path: Path) -> None:
    assert fault_of(name) is None
    assert checked_name(name, "x") == name == inside(tmp_path, name, "x").name
    (tmp_path / name).write_text("")  # as file systems see it


@pytest.mark.parametrize(("name", "fault"), BAD.items())
def test_other_names_are_refused_with_their_place(name: str, fault: str) -> None:
    with pytest.raises(CheckpointError, match=f"^index.json names a file .*{fault}") as error:
        checked_name(name, "index.json")
    assert str(error.value).isprintable()


@pytest.mark.parametrize("name", [None, 7, ["a"], b"a", True])
def test_what_is_no_text_is_refused(name: object) -> None:
    for check in (checked_name, checked_path):
        with pytest.raises(CheckpointError, match="not text"):
            check(name, "index.json")


@pytest.mark.parametrize("name", ["hf/a", "a/b/c.json", *GOOD])
def test_paths_inside(name: str, tmp_path: Path) -> None:
    assert path_fault_of(name) is None
    assert checked_path(name, "x") == name
    assert inside(tmp_path, name, "x") == tmp_path / name


@pytest.mark.parametrize("name", ["/a", "a/../b", "..", "a/..", "a//b", "a/", "a/./b", "b/" * 99])
def test_paths_that_lead_out_are_refused(name: str, tmp_path: Path) -> None:
    assert path_fault_of(name) is not None
    with pytest.raises(CheckpointError, match="manifest.json names a file"):
        inside(tmp_path, name, "manifest.json")


@pytest.mark.parametrize("place", ["a", "a/b"])
def test_no_link_lies_on_the_way(place: str, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / place).parent.mkdir(exist_ok=True)
    (tmp_path / place).symlink_to(tmp_path / "out")
    with pytest.raises(CheckpointError, match=f"{tmp_path / place} is a link"):
        inside(tmp_path, "a/b", "x")
