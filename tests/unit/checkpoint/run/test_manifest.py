"""A manifest says the same after a round trip, and says so when it does not."""

from __future__ import annotations

import json
import re
from types import SimpleNamespace

import pytest

from torchprime.checkpoint.run.manifest import FORMAT_VERSION, Manifest, read_manifest
from torchprime.checkpoint.run.storage import MANIFEST, Storage
from torchprime.errors import CheckpointError

FILES = {"a": {"bytes": 3, "sha256": "d" * 64}}


def test_round_trip(storage: Storage, run_checkpoint: SimpleNamespace) -> None:
    manifest = run_checkpoint.manifest(
        files=FILES, metrics={"loss": 0.1 + 0.2, "Straße": float("inf")}, hooks={"h": [1, None]}
    )
    with storage.create("step") as writer:
        writer.write_bytes(MANIFEST, manifest.to_bytes())
    assert read_manifest(storage, "step") == manifest
    assert manifest.step == manifest.global_step == 3


def test_every_changed_digit_is_found(run_checkpoint: SimpleNamespace) -> None:
    text = run_checkpoint.manifest(files=FILES).to_bytes().decode()
    digits = [match.start() for match in re.finditer(r"\d", text)]
    assert len(digits) > 90
    for place in digits:
        changed = text[:place] + str((int(text[place]) + 1) % 10) + text[place + 1 :]
        with pytest.raises(CheckpointError, match="^where "):
            Manifest.from_bytes(changed.encode(), "where")


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"{}", b"3", b"\xff\xfe"])
def test_what_is_no_manifest_is_named(data: bytes) -> None:
    with pytest.raises(CheckpointError, match="somewhere is not a manifest"):
        Manifest.from_bytes(data, "somewhere")


def test_another_format_is_refused(run_checkpoint: SimpleNamespace) -> None:
    content = json.loads(run_checkpoint.manifest().to_bytes())
    assert content["format_version"] == FORMAT_VERSION
    newer = json.dumps({**content, "format_version": FORMAT_VERSION + 1}).encode()
    with pytest.raises(CheckpointError, match=f"format {FORMAT_VERSION + 1}"):
        Manifest.from_bytes(newer, "x")


@pytest.mark.parametrize(
    ("part", "without"),
    [("data_position", "num_blocks"), ("scheduler", "peak"), ("best_metric", "step")],
)
def test_what_a_resume_needs_must_be_there(
    run_checkpoint: SimpleNamespace, part: str, without: str
) -> None:
    incomplete = dict(getattr(run_checkpoint.manifest(), part))
    del incomplete[without]
    with pytest.raises(ValueError, match=f"{part} lacks {without}"):
        run_checkpoint.manifest(**{part: incomplete})


def test_no_manifest_is_no_checkpoint(storage: Storage) -> None:
    with pytest.raises(CheckpointError, match="no manifest.json"):
        read_manifest(storage, "step")
