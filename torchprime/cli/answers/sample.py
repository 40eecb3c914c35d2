"""`torchprime sample MODEL --out DIR --config-name NAME`: training rows by rejection sampling.

The model answers the config's rows several times, the config's graders grade, and the right answers
become rows to train on.
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import TYPE_CHECKING

from torchprime.cli.shared.arguments import make_parser, positive, run_with_rest, with_model_first
from torchprime.cli.shared.backends import refuse_sweep
from torchprime.cli.shared.engines import add_engine_flags, model_argument, with_engine
from torchprime.cli.shared.without_training import assume_model
from torchprime.config.entry import run_main
from torchprime.config.paths import local_path
from torchprime.config.schema import TrainConfig
from torchprime.text.terminal import say

if TYPE_CHECKING:
    from torchprime.training.inference.engine import OpenEngine

ALL = "all"
EPILOG = """\
DIR gets samples.jsonl with every answer and its grades, and rows.jsonl with the kept ones: train on
them with dataset=file dataset.file_dataset_path=DIR/rows.jsonl. If the command is killed, the same
command goes on in DIR.

Exit code: 0; 2 for a mistake, or if no answer is right.
"""


def sample_main(argv: list[str]) -> int:
    """Run `sample` with the arguments after it; return the exit code."""
    parser = make_parser(
        "torchprime sample",
        "Sample answers to a config's rows, grade them, and keep the right ones as training rows.",
        EPILOG,
    )
    parser.usage = (
        "torchprime sample MODEL --out DIR [--answers K] [--keep N] --config-name NAME "
        "[key=value ...]"
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help="a Hugging Face or PEFT folder, or a hub name")
    add("--out", metavar="DIR", required=True, help="new folder, or one to go on in")
    add("--rows", choices=("train", "eval"), default="train", help="which rows (default: train)")
    add("--limit", type=positive, metavar="N", help="only the first N rows")
    add("--answers", type=positive, default=4, metavar="K", help="of each row (default: 4)")
    add(
        "--keep",
        type=_count_or_all,
        metavar="N",
        help="right answers of a row, the shortest ones (default: all that differ)",
    )
    add("--right", metavar="A,B", help="graders that decide (default: all that pass or fail)")
    add("--temperature", type=float, default=1.0, metavar="T", help="default: 1")
    add("--top-p", type=float, default=1.0, metavar="P", help="default: 1, all tokens")
    add("--top-k", type=int, metavar="N", help="default: all tokens")
    add("--max-new-tokens", type=int, metavar="N", help="default: eval.generate.max_new_tokens")
    add("--seed", type=int, metavar="N", help="default: the config's")
    add_engine_flags(parser)
    return run_with_rest(parser, with_model_first(argv), _compose)


def _count_or_all(text: str) -> int | None:
    return None if text == ALL else positive(text)


def _compose(given: argparse.Namespace, rest: list[str]) -> int:
    return run_main(
        lambda config: _sample(config, given),
        rest,
        lambda: refuse_sweep("sample", f"writes one folder (--out {given.out})"),
        fill=partial(assume_model, model=given.model),
    )


def _sample(config: TrainConfig, given: argparse.Namespace) -> int:
    def use(open_engine: OpenEngine) -> None:
        # late: transformers looks for torch_xla when imported, and imports it
        from torchprime.training.inference.sample import SampleRequest, sample_rows

        request = SampleRequest(
            model=model_argument(given),
            out=local_path("--out", given.out),
            side=given.rows,
            limit=given.limit,
            answers=given.answers,
            right=None if given.right is None else [n.strip() for n in given.right.split(",")],
            keep=given.keep,
            temperature=given.temperature,
            top_k=given.top_k,
            top_p=given.top_p,
            max_new_tokens=given.max_new_tokens,
            seed=given.seed,
        )
        sample_rows(config, request, open_engine, say)

    with_engine(config, given, use)
    return 0
