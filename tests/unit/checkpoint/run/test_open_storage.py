"""Paths and URLs find their kind of storage."""

from __future__ import annotations

from pathlib import Path

import pytest

from torchprime.checkpoint.run.open_storage import open_storage
from torchprime.errors import RuntimeSetupError


def test_kinds_of_places(tmp_path: Path) -> None:
    assert open_storage(f"file://{tmp_path}").describe("x") == str(tmp_path / "x")
    assert open_storage("memory://there/run").describe("x") == "memory://there/run/x"
    with pytest.raises(RuntimeSetupError, match="nosuch://bucket cannot be used"):
        open_storage("nosuch://bucket")
    assert open_storage(tmp_path / "not" / "yet").free_bytes() > 0  # type: ignore[operator]
    assert open_storage("memory://there").free_bytes() is None
