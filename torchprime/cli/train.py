"""`torchprime train`: the main job, on the backend that fits the host.

The backends' own entry points, `torchprime/torch_xla_models/train.py` and
`torchprime.torch_native.train`, take the same configs and overrides.
"""

from __future__ import annotations

from collections.abc import Callable

from torchprime.cli.shared.backends import FLAG, NAMES, TORCHRUN, choose_backend
from torchprime.config.entry import run_main
from torchprime.config.many_runs.processes import this_program
from torchprime.config.schema import TrainConfig
from torchprime.errors import ConfigError
from torchprime.sweep.command import run_sweep
from torchprime.text.terminal import is_first_process, print_lines, reported, say
from torchprime.torch_native import train as native
from torchprime.torch_xla_models import train as xla

MAINS: dict[str, Callable[[TrainConfig], int]] = {"xla": xla.main, "native": native.main}
HELP = f"""\
usage: torchprime train [{FLAG} xla|native] --config-name NAME [key=value ...]

The backend is chosen by the host: XLA on TPUs and CPUs; native under torchrun and on CUDA GPUs.
{FLAG} chooses it instead. On several GPUs: {TORCHRUN.format("N")} ...
"""


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


def train(config: TrainConfig, asked: str | None = None) -> int:
    """Choose a backend, print which one and why, and train on it; the exit code."""
    backend, reason, instead = choose_backend(asked, config.compile_only, device=config.device)
    if is_first_process():
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
