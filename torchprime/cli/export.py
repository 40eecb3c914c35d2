"""`torchprime export CHECKPOINT --out DIR`: a Hugging Face folder of a run's checkpoint.

It needs no accelerator. torchprime/checkpoint/from_checkpoint.py makes it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from torchprime.checkpoint.from_checkpoint import export_checkpoint, find_checkpoint, send_export
from torchprime.checkpoint.proof.certificate import CERTIFICATE
from torchprime.cli.shared.arguments import make_parser, run_command
from torchprime.cli.shared.base import base_weights
from torchprime.config.paths import is_url, place
from torchprime.errors import ConfigError
from torchprime.text.terminal import print_lines

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
EPILOG = """\
CHECKPOINT is a folder or URL: RUN/checkpoints/step_00000600, RUN/checkpoints/best, or RUN for the
newest whole one. The folder of an export is copied as it is. Exit code: 0; 2 if nothing was
exported, or a check of the certificate failed.
"""


def export_main(argv: list[str]) -> int:
    """Run `export` with the arguments after it; return the exit code."""
    parser = make_parser(
        "torchprime export", "Export a run's checkpoint as a Hugging Face folder.", EPILOG
    )
    add = parser.add_argument
    add("checkpoint", metavar="CHECKPOINT")
    add("--out", metavar="DIR", required=True, help="new or empty folder or URL")
    add("--dtype", choices=list(DTYPES), help="dtype of the weights (default: as trained)")
    add("--base", metavar="FOLDER", help="the base's weights, if they were moved")
    return run_command(parser, argv, _export)


def _say(line: str) -> None:
    print_lines([line], "backslashreplace")


def _export(given: argparse.Namespace) -> int:
    out = place("--out", given.out)
    source = place("CHECKPOINT", given.checkpoint)
    if not is_url(source) and (Path(source) / CERTIFICATE).is_file():
        if given.dtype is not None or given.base is not None:
            raise ConfigError(
                f"--dtype, --base: given with {source}, which is an export and is copied as it is. "
                "Leave them out, or name a checkpoint."
            )
        send_export(Path(source), out, _say)
        return 0
    storage, name = find_checkpoint(source, _say)
    dtype = None if given.dtype is None else DTYPES[given.dtype]
    export_checkpoint(storage, name, out, dtype=dtype, base=base_weights(given.base), say=_say)
    return 0
