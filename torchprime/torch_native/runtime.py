"""Processes, their device, and how they find each other.

torchrun starts one process per GPU and says in the environment who they are. Started alone, the
program is a group of one.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from torchprime.errors import RuntimeSetupError

# A collective that takes longer than this has lost a partner.
TIMEOUT = timedelta(minutes=10)


def start_processes() -> torch.device:
    """Join the group and return this process' device.

    Raises:
        RuntimeSetupError: the group cannot be formed.
    """
    cuda = torch.cuda.is_available()
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if dist.is_initialized():
        return device
    backend = "nccl" if cuda else "gloo"
    try:
        if "WORLD_SIZE" in os.environ:
            dist.init_process_group(backend, timeout=TIMEOUT)
        else:
            store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
            dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=TIMEOUT)
    except Exception as error:
        raise RuntimeSetupError(f"{lost_partner()} ({type(error).__name__}: {error})") from error
    return device


def lost_partner() -> str:
    """What to say when processes do not find or no longer hear each other."""
    rank, size = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    return (
        f"rank {rank} of {size}: the processes cannot talk to each other. Look at the other ranks' "
        "output for the first error; with GPUs that cannot reach each other directly, try "
        "NCCL_P2P_DISABLE=1"
    )


@contextmanager
def saying_who_is_lost() -> Iterator[None]:
    """A collective that fails or times out becomes a message with this rank in it.

    Raises:
        RuntimeSetupError: instead of torch's DistError.
    """
    try:
        yield
    except dist.DistError as error:
        raise RuntimeSetupError(f"{lost_partner()} ({type(error).__name__}: {error})") from error


def stop_processes() -> None:
    """Leave the group; without it torch complains at exit."""
    if dist.is_initialized():
        dist.destroy_process_group()
