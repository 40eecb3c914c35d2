"""The storage at a path or URL."""

from __future__ import annotations

from pathlib import Path

from torchprime.checkpoint.run.local_storage import LocalStorage
from torchprime.checkpoint.run.storage import Storage
from torchprime.checkpoint.run.url_storage import UrlStorage


def open_storage(place: str | Path) -> Storage:
    """Return the storage at a local path or fsspec URL; nothing is created yet.

    Raises:
        RuntimeSetupError: no package here reads that kind of URL.
    """
    if isinstance(place, Path) or "://" not in place:
        return LocalStorage(Path(place))
    if place.startswith(("file://", "local://")):
        return LocalStorage(Path(place.split("://", 1)[1]))
    return UrlStorage(place)
