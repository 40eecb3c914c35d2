"""Checkpoints changed by somebody who knows how: hashes and sizes fit afterwards."""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

MANIFEST, METADATA = "manifest.json", ".metadata"


def change_manifest(checkpoint: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the manifest, after it has the hashes of the files as they are now."""
    path = checkpoint / MANIFEST
    content = json.loads(path.read_text())
    for name in content["files"]:
        data = (checkpoint / name).read_bytes()
        content["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    change(content)
    write_manifest(path, content)


def write_manifest(path: Path, content: dict[str, Any]) -> None:
    """Write it with a hash of itself that fits."""
    plain = {k: v for k, v in content.items() if k not in ("format_version", "sha256")}
    canonical = json.dumps(plain, sort_keys=True, separators=(",", ":"))
    content = {**content, "sha256": hashlib.sha256(canonical.encode()).hexdigest()}
    path.write_text(json.dumps(content))


def change_metadata(checkpoint: Path, change: Callable[[Any], object]) -> None:
    """Change what `.metadata` says."""
    path = checkpoint / METADATA
    metadata = pickle.loads(path.read_bytes())
    change(metadata)
    replace_file(checkpoint, METADATA, pickle.dumps(metadata))


def replace_file(checkpoint: Path, name: str, data: bytes) -> None:
    """Give a file other bytes, of which the manifest knows."""
    (checkpoint / name).write_bytes(data)
    change_manifest(checkpoint, lambda content: None)
