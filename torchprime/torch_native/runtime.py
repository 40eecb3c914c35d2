"""The process group: processes, their device, and the message if one is lost.

torchrun starts one process per GPU and sets their ranks in the environment. Started alone, the
program is a group of one.

A process whose partner died or hangs must not wait for ever, and must report more than a stack of
transport errors. gloo raises when a connection breaks or a collective takes too long, and `group`
turns that into one message. NCCL raises little: its kernels wait on the device, the host waits for
them, and after its timeout NCCL's own watchdog aborts the process. So the calls in which a process
waits for its partners are `watched`: one that takes too long ends the process, with the message,
before NCCL would.
"""

from __future__ import annotations

import base64
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import wraps
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile

from torchprime.errors import ConfigError, RuntimeSetupError, UserError
from torchprime.text.terminal import say

# A collective that takes longer than this has lost a partner; the environment may set another
# value.
TIMEOUT_VARIABLE, TIMEOUT_SECONDS = "TORCHPRIME_TIMEOUT_SECONDS", 600.0
# NCCL's own watchdog, which aborts without our message, comes this much later.
GRACE = timedelta(minutes=2)
# Texts that distinguish gloo's errors, plain RuntimeErrors, from ours.
GLOO_WORDS = ("gloo", "Connection closed by peer", "pair closure", "Timed out waiting")

Function = TypeVar("Function", bound=Callable[..., Any])


def timeout_seconds() -> float:
    """Return the timeout of a collective in seconds.

    Raises:
        ConfigError: the environment variable is no number above 0.
    """
    given = os.environ.get(TIMEOUT_VARIABLE)
    if given is None:
        return TIMEOUT_SECONDS
    try:
        seconds = float(given)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < threading.TIMEOUT_MAX:
        raise ConfigError(
            f"{TIMEOUT_VARIABLE}: given {given!r}, expected a number of seconds above 0. Unset it "
            f"for {TIMEOUT_SECONDS:g}."
        )
    return seconds


def start_processes() -> torch.device:
    """Join the group and return this process's device.

    Raises:
        RuntimeSetupError: the group cannot be formed.
    """
    cuda = torch.cuda.is_available()
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        if local_rank >= (count := torch.cuda.device_count()):
            raise RuntimeSetupError(
                f"LOCAL_RANK={local_rank}, but this host has {count} GPUs that are visible. Start "
                f"torchrun --standalone --nproc_per_node={count}, or look at CUDA_VISIBLE_DEVICES."
            )
        torch.cuda.set_device(device)
    if dist.is_initialized():
        return device
    join("nccl" if cuda else "gloo")
    return device


def join(backend: str) -> None:
    """Form the process group of torchrun's processes, or of this one alone.

    Args:
        backend: of torch.distributed.

    Raises:
        RuntimeSetupError: the group cannot be formed.
    """
    timeout = transport_timeout()
    try:
        if "WORLD_SIZE" in os.environ:
            dist.init_process_group(backend, timeout=timeout)
        else:
            store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
            dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)
    except Exception as error:
        raise lost_partner(error) from error


def transport_timeout() -> timedelta:
    """Return the timeout after which gloo raises, or NCCL's own watchdog aborts: later than
    ours."""
    seconds = timedelta(seconds=timeout_seconds())
    return seconds + GRACE if torch.cuda.is_available() else seconds


def lost_partner(why: object) -> RuntimeSetupError:
    """Return the message for processes that do not find or no longer hear each other."""
    rank, size = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    told = f"{type(why).__name__}: {why}" if isinstance(why, BaseException) else str(why)
    between = ""
    if os.environ.get("LOCAL_WORLD_SIZE", size) != size:  # it may be the loopback address
        between = (
            "on several hosts, name the interface that connects them (ip addr): "
            "GLOO_SOCKET_IFNAME=eth0 NCCL_SOCKET_IFNAME=eth0; "
        )
    return RuntimeSetupError(
        f"rank {rank} of {size}: the processes cannot talk to each other. Look at the other ranks' "
        f"output for the first error; {between}with GPUs that cannot reach each other directly, "
        f"try NCCL_P2P_DISABLE=1; {TIMEOUT_VARIABLE} allows more than {timeout_seconds():g} s. "
        f"({' '.join(told.split())})"
    )


@contextmanager
def group() -> Iterator[None]:
    """Wrap all communication with other processes: a lost partner becomes a message with this rank.

    The group is left at the end.

    Raises:
        RuntimeSetupError: instead of torch's and gloo's errors.
    """
    try:
        yield
    except UserError:
        stop_processes()
        raise
    except (dist.DistError, RuntimeError) as error:
        # The group is not left: after a lost partner even that may wait for it.
        if isinstance(error, dist.DistError) or any(word in str(error) for word in GLOO_WORDS):
            raise lost_partner(error) from error
        raise
    stop_processes()


def stop_processes() -> None:
    """Leave the group; otherwise torch warns at exit."""
    if dist.is_initialized():
        dist.destroy_process_group()
    _forget_meshes()


def _forget_meshes() -> None:
    """Clear DTensor's cache of operations.

    A cached result has the mesh of its first call. A mesh of the next group in this process may be
    equal to it, and its result would then communicate in a group that has ended.
    """
    propagator = getattr(getattr(DTensor, "_op_dispatcher", None), "sharding_propagator", None)
    cached = getattr(getattr(propagator, "propagate_op_sharding", None), "cache", None)
    clear = getattr(cached, "cache_clear", None)
    if clear is not None:
        clear()


# Waiting ------------------------------------------------------------------------------------------


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """End the process if it waits too long inside for its device or its partners.

    torch waits without the interpreter's lock, so that a timer can print the message and exit.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:  # no partner to lose
        yield
        return
    seconds = timeout_seconds()
    # gloo's own timeout raises in the waiting thread, with more detail: let it come first.
    late = seconds if torch.cuda.is_available() else seconds + GRACE.total_seconds()
    timer = threading.Timer(late, _leave, [f"{what} took more than {late:g} s"])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _leave(why: str) -> None:
    error = lost_partner(why)
    say(f"error: {error}")
    # Not sys.exit: the main thread hangs in a call that never ends.
    os._exit(error.exit_code)


def watched(method: Function) -> Function:
    """Return a method in which a process may wait for others."""

    @wraps(method)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with waiting(method.__name__):
            return method(*args, **kwargs)

    return wrapped  # pyright: ignore[reportReturnType]


# The device ---------------------------------------------------------------------------------------


class OwnDevice:
    """The methods of a backend that concern this process's device alone."""

    device: torch.device
    _profile: profile | None = None

    def seed(self, seed: int) -> None:
        """Seed this process's CUDA generator; a CPU has none besides torch's own."""
        if self.device.type == "cuda":
            torch.cuda.manual_seed(seed)

    def rng_state(self) -> str:
        """Return the CUDA generator's state in base64; "" on a CPU."""
        if self.device.type != "cuda":
            return ""
        return base64.b64encode(torch.cuda.get_rng_state(self.device).numpy().tobytes()).decode()

    def set_rng_state(self, state: str) -> None:
        """Restore a state that `rng_state` returned; nothing on a CPU, or for ""."""
        if self.device.type == "cuda" and state:
            values = torch.frombuffer(bytearray(base64.b64decode(state)), dtype=torch.uint8)
            torch.cuda.set_rng_state(values, self.device)

    def start_profile(self, folder: str) -> None:
        """Start torch's profiler; every process writes its own trace to the folder."""
        activities = [ProfilerActivity.CPU]
        activities += [ProfilerActivity.CUDA] if self.device.type == "cuda" else []
        handler = torch.profiler.tensorboard_trace_handler(folder)
        self._profile = profile(activities=activities, on_trace_ready=handler)
        self._profile.start()

    def stop_profile(self) -> None:
        """Stop the profiler, which writes the trace."""
        assert self._profile is not None
        self._profile.stop()
        self._profile = None

    def device_memory_bytes(self) -> int | None:
        """Return the peak bytes in use on this process's device, if it reports them."""
        if self.device.type != "cuda":
            return None
        return int(torch.cuda.max_memory_allocated(self.device))
