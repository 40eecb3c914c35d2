"""A pool of processes that share the work on many rows."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any

from torchprime.errors import RuntimeSetupError


@contextmanager
def worker_pool(
    workers: int, task: str, start: Callable[..., object], arguments: tuple[Any, ...]
) -> Iterator[ProcessPoolExecutor]:
    """Open a pool of processes; each calls `start` with `arguments` before any work.

    Args:
        task: the work of the processes, for messages.

    Raises:
        RuntimeSetupError: a process ended before its work was done.
    """
    try:
        with ProcessPoolExecutor(
            workers,
            mp_context=multiprocessing.get_context("spawn"),  # a fork would copy XLA's threads
            initializer=start,
            initargs=arguments,
        ) as pool:
            yield pool
    except BrokenProcessPool as error:
        raise RuntimeSetupError(
            f"A process that was {task} ended before its work was done. Most often the system ran "
            "out of memory and killed it (`dmesg` says so): use fewer processes "
            "(dataset.num_proc=1), or a machine with more memory."
        ) from error
