"""`torchprime train`: the main job, on the backend that fits the host.

`choose_backend` decides without importing torch_xla: importing it takes seconds and fixes the
devices. The backends' own entry points, `torchprime/torch_xla_models/train.py` and
`torchprime.torch_native.train`, take the same configs and overrides.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from typing import NamedTuple

from torchprime.config.entry import run_main
from torchprime.config.many_runs.processes import this_program
from torchprime.config.schema import TrainConfig
from torchprime.errors import ConfigError
from torchprime.sweep.command import run_sweep
from torchprime.text.terminal import print_lines, reported, say
from torchprime.torch_native import train as native
from torchprime.torch_xla_models import train as xla
from torchprime.torch_xla_models.runtime import host_has_tpu, tpu_chips

FLAG = "--backend"
NAMES = {"xla": "PyTorch/XLA", "native": "torch.distributed"}
MAINS: dict[str, Callable[[TrainConfig], int]] = {"xla": xla.main, "native": native.main}
TORCHRUN = "torchrun --standalone --nproc_per_node={} -m torchprime.cli.main train"
HELP = f"""\
usage: torchprime train [{FLAG} xla|native] --config-name NAME [key=value ...]

The backend is chosen by the host: XLA on TPUs and CPUs; native under torchrun and on CUDA GPUs.
{FLAG} chooses it instead. On several GPUs: {TORCHRUN.format("N")} ...
"""


class Choice(NamedTuple):
    """A backend, why it runs, and how to choose otherwise."""

    backend: str
    reason: str
    instead: str = ""


def take_flag(argv: list[str]) -> tuple[str | None, list[str]]:
    """Split `--backend` off a command line; the rest is the run's.

    Raises:
        ConfigError: the flag is given twice, without a value, or with one that is no backend.
    """
    given: list[str] = []
    rest: list[str] = []
    words = iter(argv)
    for word in words:
        if word == FLAG:
            given.append(next(words, ""))
        elif word.startswith(f"{FLAG}="):
            given.append(word.removeprefix(f"{FLAG}="))
        else:
            rest.append(word)
    if len(given) > 1 or any(each not in NAMES for each in given):
        raise ConfigError(
            f"{FLAG}: given {' and '.join(map(repr, given))}, expected one of "
            f"{', '.join(NAMES)}. Leave it out to let the host decide."
        )
    return (given[0] if given else None), rest


def choose_backend(asked: str | None, compile_only: str | None) -> Choice:
    """Choose the backend for this host and process.

    Args:
        asked: the backend given by `--backend`.
        compile_only: the config's; only the XLA backend compiles for TPUs.

    Raises:
        ConfigError: XLA is asked for in one of several processes that torchrun started.
    """
    local = os.environ.get("LOCAL_WORLD_SIZE", "1")
    if asked == "xla" and local != "1":
        raise ConfigError(
            f"{FLAG}: given 'xla' under torchrun with {local} processes on this host, expected "
            "one process: XLA drives all of a host's devices from it. Start without torchrun, or "
            f"write {FLAG} native."
        )
    if asked is not None:
        return Choice(asked, f"given by {FLAG}")
    if (size := os.environ.get("WORLD_SIZE")) is not None:
        reason = f"torchrun started this process, one of {size}"
        return Choice("native", reason, "for XLA, start without torchrun")
    if compile_only is not None:
        return Choice("xla", "compile_only asks for the TPU's compiler")
    if (device := os.environ.get("PJRT_DEVICE")) is not None:
        return Choice("xla", f"PJRT_DEVICE is {device}", f"for the other: {FLAG} native")
    if host_has_tpu():
        reason = f"this host has {len(tpu_chips())} TPU chips"
        return Choice("xla", reason, f"for the other: {FLAG} native")
    return _without_tpu()


def _without_tpu() -> Choice:
    # late: it takes seconds, which a TPU or torchrun makes unnecessary
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    other = f"for the other: {FLAG} xla"
    if gpus == 1:
        return Choice("native", "this host has a CUDA GPU and no TPU", other)
    if gpus > 1:
        reason = f"this host has {gpus} CUDA GPUs and no TPU; this process uses one"
        return Choice("native", reason, f"for all: {TORCHRUN.format(gpus)} ...; {other}")
    if importlib.util.find_spec("torch_xla") is None:
        reason = "this host has neither TPU nor CUDA GPU, and torch_xla is not installed"
        return Choice("native", reason, "for the other: pip install 'torchprime[xla]'")
    reason = "this host has neither TPU nor CUDA GPU"
    return Choice("xla", reason, f"for the other: {FLAG} native")


def train(config: TrainConfig, asked: str | None = None) -> int:
    """Choose a backend, print which one and why, and train on it; the exit code."""
    backend, reason, instead = choose_backend(asked, config.compile_only)
    if os.environ.get("RANK", "0") == "0":
        more = f" ({instead})" if instead else ""
        say(f"backend {backend} ({NAMES[backend]}): {reason}{more}")
    return MAINS[backend](config)


def train_main(argv: list[str]) -> int:
    """Run `train` with the arguments after it; the exit code."""
    return reported(lambda: _train(argv))


def _train(argv: list[str]) -> int:
    asked, rest = take_flag(argv)
    if {"-h", "--help"} & set(rest):
        print_lines([HELP])
    chosen = [] if asked is None else [FLAG, asked]
    return run_main(
        lambda config: train(config, asked),
        rest,
        lambda: [*this_program(argv), *chosen],
        run_sweep,
    )
