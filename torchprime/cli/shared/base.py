"""The argument `--base`: the weights that a run began with."""

from __future__ import annotations

from pathlib import Path

from torchprime.checkpoint.hf.source import resolve_pretrained
from torchprime.config.paths import name_or_folder


def base_weights(given: str | None) -> Path | None:
    """Return the folder of the base's weights, fetched if the hub has them; None if not given."""
    if given is None:
        return None
    return resolve_pretrained(name_or_folder("--base", given), cache_dir=None, weights=True)
