"""A process that dies while it helps is one message, and so is one that never starts."""

from __future__ import annotations

import os

import pytest

from torchprime.data.shared.worker_pool import worker_pool
from torchprime.errors import DataError, RuntimeSetupError

TOLD = "A process that was tokenizing rows ended before its work was done.*dataset.num_proc=1"


def test_a_process_that_dies_is_told() -> None:
    """As when the system kills it for memory: without a word of its own."""
    with (
        pytest.raises(RuntimeSetupError, match=TOLD),
        worker_pool(1, "tokenizing rows", int, ()) as pool,
    ):
        assert pool.submit(max, 2, 3).result() == 3
        pool.submit(os._exit, 9).result()
    with (
        pytest.raises(RuntimeSetupError, match=TOLD),
        worker_pool(1, "tokenizing rows", os._exit, (9,)) as pool,
    ):
        pool.submit(max, 2, 3).result()


def test_what_is_raised_inside_stays_what_it_is() -> None:
    with pytest.raises(DataError, match="mine"), worker_pool(1, "x", int, ()):
        raise DataError("mine")
