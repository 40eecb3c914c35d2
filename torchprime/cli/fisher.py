"""`torchprime fisher`: measure the Fisher information of a base, for `regularization.ewc`.

It runs on the backend that `torchprime train` would choose, with the config's mesh.
"""

from __future__ import annotations

import argparse

from torchprime.cli.shared.arguments import make_parser, positive, run_with_rest
from torchprime.cli.shared.backends import (
    NAMES,
    MakeBackend,
    choose_backend,
    refuse_sweep,
    with_backend,
)
from torchprime.cli.shared.without_training import assume_steps
from torchprime.config.entry import run_main
from torchprime.config.paths import local_path
from torchprime.config.schema import TrainConfig
from torchprime.text.terminal import say

EXAMPLES = 1000
EPILOG = """\
The rows are the config's training rows: choose general ones, such as those that the base should not
forget. Each example is one update with its own gradient, so 1,000 examples cost 1,000 updates of
one example. docs/forgetting.md has the formula.

Exit code: 0; 2 if nothing was written.
"""


def fisher_main(argv: list[str]) -> int:
    """Run `fisher` with the arguments after it; return the exit code."""
    parser = make_parser(
        "torchprime fisher",
        "Measure the diagonal Fisher information of a config's base on its training rows.",
        EPILOG,
    )
    parser.usage = "torchprime fisher --out DIR [--examples N] --config-name NAME [key=value ...]"
    add = parser.add_argument
    add("--out", metavar="DIR", required=True, help="new or empty folder")
    add(
        "--examples",
        type=positive,
        default=EXAMPLES,
        metavar="N",
        help=f"in the order of the seed; all if there are fewer (default: {EXAMPLES:,})",
    )
    add("--backend", choices=list(NAMES), help="instead of the one that fits this host")
    return run_with_rest(parser, argv, _compose)


def _compose(given: argparse.Namespace, rest: list[str]) -> int:
    return run_main(
        lambda config: _measure(config, given),
        rest,
        lambda: refuse_sweep("fisher", f"writes one folder (--out {given.out})"),
        fill=assume_steps,
    )


def _measure(config: TrainConfig, given: argparse.Namespace) -> int:
    with_backend(
        config,
        choose_backend(given.backend, None, device=config.device),
        lambda make_backend: _run(config, make_backend, given),
    )
    return 0


def _run(config: TrainConfig, make_backend: MakeBackend, given: argparse.Namespace) -> None:
    # late: transformers looks for torch_xla when imported, and imports it
    from torchprime.training.fisher import FisherRequest, measure_fisher

    request = FisherRequest(local_path("--out", given.out), given.examples)
    measure_fisher(config, make_backend, request, say)
