"""A stranger's JSON file: what is no plain, small, shallow object is one message with its name."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from torchprime.errors import CheckpointError
from torchprime.files.json_files import (
    DEEPEST,
    read_json,
    read_json_if_there,
    read_regular,
    token_ids,
)


def nested(depth: int) -> bytes:
    return b'{"a": ' + b"[" * (depth - 1) + b"]" * (depth - 1) + b"}"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"{", "cannot be read as JSON"),
        (b"", "cannot be read as JSON"),
        (b"[]", "holds a list, expected a JSON object"),
        (b"null", "holds a NoneType"),
        (b'{"a": "\xff"}', "cannot be read as JSON: 'utf-8' codec can't decode"),
        (b'{"a": 1, "b": {"c": 1, "c": 2}}', "the key 'c' is written twice in one object"),
        (b'{"a": "\\ud800"}', "surrogates not allowed"),
        (b'{"\\ud800": 1}', "surrogates not allowed"),
        (b'{"a": 1' + b"0" * 9000 + b"}", "Exceeds the limit"),
        (nested(DEEPEST + 1), "nested more than 64 deep"),
        (nested(10**5), "nested more than 64 deep"),
        (b"[" * 10**5, "cannot be read as JSON"),
        (b'{"a": "' + b"x" * 2000 + b'"}', "has more than 1,000 bytes"),
    ],
)
def test_a_file_that_is_no_plain_object_is_named(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(data)
    most = 1000 if b"xxx" in data else 10**6
    with pytest.raises(CheckpointError) as caught:
        read_json(path, most=most)
    assert message in str(caught.value) and str(path) in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_an_object_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(nested(DEEPEST))
    assert read_json(path) == read_json_if_there(path)
    path.write_text('{"é": ["東京", 1, null, {"b": NaN}], "a": "\\ud83d\\ude42"}', encoding="utf-8")
    assert read_json(path)["a"] == "🙂" and read_json(path)["é"][0] == "東京"
    assert read_json_if_there(tmp_path / "none.json") == {}


@pytest.mark.parametrize("kind", ["pipe", "device", "linked device", "folder", "dangling", "none"])
def test_only_a_regular_file_is_read(tmp_path: Path, kind: str) -> None:
    """A pipe that nobody writes to must not be waited for."""
    path = tmp_path / "config.json"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind in ("linked device", "dangling"):
        path.symlink_to("/dev/zero" if kind == "linked device" else tmp_path / "gone")
    place = Path("/dev/zero") if kind == "device" else path
    with pytest.raises(CheckpointError, match="is not a regular file|cannot be read: "):
        read_regular(place, most=100)
    if kind != "none":
        with pytest.raises(CheckpointError):
            read_json_if_there(place)


def test_a_file_may_grow_to_its_bound(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"x" * 100)
    assert read_regular(path, most=100) == b"x" * 100
    with pytest.raises(CheckpointError, match="has more than"):
        read_regular(path, most=99)


@pytest.mark.parametrize(("value", "expected"), [(None, []), (0, [0]), ([3, 1], [3, 1]), ([], [])])
def test_token_ids_are_one_or_several(value: object, expected: list[int]) -> None:
    assert token_ids({"eos_token_id": value}, "eos_token_id", "config.json") == expected


@pytest.mark.parametrize("value", ["</s>", True, 1.0, -1, [[1]], [None], {"a": 1}])
def test_what_is_no_token_id_is_named(value: object) -> None:
    with pytest.raises(CheckpointError, match="config.json: eos_token_id is .* expected a token's"):
        token_ids({"eos_token_id": value}, "eos_token_id", "config.json")
