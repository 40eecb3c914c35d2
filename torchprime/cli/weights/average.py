"""`torchprime average`: the mean of several checkpoints of a model, as a Hugging Face folder.

It needs no accelerator. torchprime/checkpoint/average.py makes the folder.
"""

from __future__ import annotations

import argparse
import math

from torchprime.checkpoint.average import export_average, last_checkpoints
from torchprime.cli.shared.arguments import make_parser, positive, run_command
from torchprime.cli.shared.dtypes import DTYPES
from torchprime.config.paths import place
from torchprime.errors import ConfigError
from torchprime.text.terminal import print_lines

EPILOG = """\
CHECKPOINT is a checkpoint's folder or URL (RUN/checkpoints/step_00000600, RUN/checkpoints/best), a
run's folder for its newest one, or the folder of an export. All must have the same architecture
and tokenizer. With --last K, give one run's folder: its newest K checkpoints are averaged.

Exit code: 0; 2 if nothing was written, or a check of the certificate failed.
"""


def average_main(argv: list[str]) -> int:
    """Run `average` with the arguments after it; return the exit code."""
    parser = make_parser(
        "torchprime average", "Average the weights of checkpoints or exports of a model.", EPILOG
    )
    add = parser.add_argument
    add("checkpoints", metavar="CHECKPOINT", nargs="+")
    add("--out", metavar="DIR", required=True, help="new or empty folder or URL")
    add("--weights", metavar="W,W", help="one for each CHECKPOINT, adding up to 1 (default: equal)")
    add("--last", metavar="K", type=positive, help="the newest K checkpoints of a run's folder")
    add("--dtype", choices=list(DTYPES), help="dtype of the weights (default: as trained)")
    return run_command(parser, argv, _average)


def _average(given: argparse.Namespace) -> int:
    places = [place("CHECKPOINT", each) for each in given.checkpoints]
    if given.last is not None:
        if len(places) > 1:
            raise ConfigError(
                f"--last: given with {len(places)} folders, expected the folder of one run."
            )
        places = last_checkpoints(places[0], given.last)
    if len(places) < 2:
        raise ConfigError(
            "CHECKPOINT: given one, expected at least two to average. Name another one, or use "
            "--last K with K of 2 or more."
        )
    weights = _weights(given.weights, len(places))
    dtype = None if given.dtype is None else DTYPES[given.dtype]
    out = place("--out", given.out)
    export_average(places, weights, out, dtype=dtype, say=_say)
    return 0


def _say(line: str) -> None:
    print_lines([line], "backslashreplace")


def _weights(text: str | None, count: int) -> list[float]:
    """Return the weights of the inputs.

    Raises:
        ConfigError: they are no numbers above 0, as many as inputs, with the sum 1.
    """
    if text is None:
        return [1 / count] * count
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = []
    right = len(found) == count and all(w > 0 for w in found) and math.isfinite(sum(found))
    if not right or abs(sum(found) - 1) > 1e-6:
        raise ConfigError(
            f"--weights: given {text!r}, expected {count} numbers above 0 that add up to 1, one "
            "for each input. Write --weights 0.5,0.3,0.2, or leave it out for equal ones."
        )
    return found
