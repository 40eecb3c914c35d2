"""`torchprime evaluate MODEL --out DIR --config-name NAME`: a model's held-out loss and answers.

It measures what a run of the config measures after its last step, of any Hugging Face folder or
PEFT adapter.
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import TYPE_CHECKING

from torchprime.cli.shared.arguments import make_parser, run_with_rest, with_model_first
from torchprime.cli.shared.backends import refuse_sweep
from torchprime.cli.shared.engines import add_engine_flags, model_argument, with_engine
from torchprime.cli.shared.without_training import assume_model
from torchprime.config.entry import run_main
from torchprime.config.paths import local_path
from torchprime.config.schema import TrainConfig
from torchprime.text.terminal import is_first_process, print_lines, say

if TYPE_CHECKING:
    from torchprime.training.inference.engine import OpenEngine

EPILOG = """\
DIR gets evaluation.json and samples.jsonl, in the form of a run's metrics.jsonl and
evaluations/step_*.jsonl. The table of scores is printed.

Exit code: 0; 2 if nothing was written.
"""


def evaluate_main(argv: list[str]) -> int:
    """Run `evaluate` with the arguments after it; return the exit code."""
    parser = make_parser(
        "torchprime evaluate",
        "Measure a model's held-out loss, and grade its answers, as a run of the config does.",
        EPILOG,
    )
    parser.usage = (
        "torchprime evaluate MODEL --out DIR [--engine NAME] --config-name NAME [key=value ...]"
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help="a Hugging Face or PEFT folder, or a hub name")
    add("--out", metavar="DIR", required=True, help="new or empty folder")
    add_engine_flags(parser)
    return run_with_rest(parser, with_model_first(argv), _compose)


def _compose(given: argparse.Namespace, rest: list[str]) -> int:
    return run_main(
        lambda config: _evaluate(config, given),
        rest,
        lambda: refuse_sweep("evaluate", f"writes one folder (--out {given.out})"),
        fill=partial(assume_model, model=given.model),
    )


def _evaluate(config: TrainConfig, given: argparse.Namespace) -> int:
    def use(open_engine: OpenEngine) -> None:
        # late: transformers looks for torch_xla when imported, and imports it
        from torchprime.training.inference.evaluate import EvaluateRequest, evaluate_model

        model = model_argument(given)
        request = EvaluateRequest(model, local_path("--out", given.out))
        lines = evaluate_model(config, request, open_engine, say)
        if is_first_process():
            print_lines([*lines, f"wrote {given.out}"])

    with_engine(config, given, use)
    return 0
