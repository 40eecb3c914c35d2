"""The package that calls of kernels from torch need."""

from __future__ import annotations

import pytest
from torch_xla._internal.jax_workarounds import maybe_get_torchax


@pytest.fixture(scope="session")
def torchax() -> None:
    """Skip tests that call a kernel from torch where torchax is missing."""
    if maybe_get_torchax() is None:
        pytest.skip("torchax, through which torch_xla calls kernels, is not here (make libtpu)")
