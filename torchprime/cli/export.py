"""`torchprime export`: a Hugging Face folder of a run's checkpoint, or of a merged adapter.

It needs no accelerator. torchprime/checkpoint/from_checkpoint.py and
torchprime/checkpoint/adapter/merged_export.py make the folders.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from torchprime.checkpoint.adapter.merged_export import Merge, export_merged
from torchprime.checkpoint.adapter.read import read_adapter
from torchprime.checkpoint.from_checkpoint import (
    Choice,
    export_checkpoint,
    find_checkpoint,
    send_export,
)
from torchprime.checkpoint.hf.source import resolve_pretrained
from torchprime.checkpoint.proof.certificate import CERTIFICATE
from torchprime.cli.shared.arguments import make_parser, run_command
from torchprime.cli.shared.base import base_weights
from torchprime.cli.shared.dtypes import DTYPES
from torchprime.config.paths import is_url, name_or_folder, place
from torchprime.errors import ConfigError
from torchprime.text.terminal import print_lines

USAGES = (
    "expected CHECKPOINT --out DIR, or --adapter ADAPTER --merge [--base BASE] --out DIR to merge "
    "a PEFT folder into its base"
)
EPILOG = """\
CHECKPOINT is a folder or URL: RUN/checkpoints/step_00000600, RUN/checkpoints/best, or RUN for the
newest whole one. The folder of an export is copied as it is.

With --adapter and --merge, a PEFT folder is merged into its base, one tensor at a time:
  torchprime export --adapter RUN/export --base BASE --merge --out DIR

Exit code: 0; 2 if nothing was exported, or a check of the certificate failed.
"""


def export_main(argv: list[str]) -> int:
    """Run `export` with the arguments after it; return the exit code."""
    parser = make_parser(
        "torchprime export",
        "Export a run's checkpoint, or merge an adapter, as a Hugging Face folder.",
        EPILOG,
    )
    add = parser.add_argument
    add("checkpoint", metavar="CHECKPOINT", nargs="?")
    add("--out", metavar="DIR", required=True, help="new or empty folder or URL")
    add("--dtype", choices=list(DTYPES), help="dtype of the weights (default: as trained)")
    add(
        "--base",
        metavar="BASE",
        help="the base's weights (folder or hub name), if they were moved",
    )
    add("--adapter", metavar="ADAPTER", help="a PEFT folder or hub name, instead of CHECKPOINT")
    add("--merge", action="store_true", help="merge the adapter into the base's weights")
    add(
        "--raw",
        action="store_true",
        help="the weights themselves, of a checkpoint that has their moving average, too",
    )
    add(
        "--base-dtype",
        choices=["run", "int8", "nf4"],
        help="values of the base that the adapter is merged into: run its own, int8 or nf4 the "
        "quantized ones (default: those that it was trained on, if its certificate names them)",
    )
    add(
        "--parts",
        choices=["text", "all"],
        help="of a base with images: its text model, or all parts, the others as in the base "
        "(default: as the run's export.parts; of a merge text)",
    )
    return run_command(parser, argv, _export)


def _say(line: str) -> None:
    print_lines([line], "backslashreplace")


def _export(given: argparse.Namespace) -> int:
    _check_usage(given)
    return _export_merged(given) if given.adapter is not None else _export_checkpoint(given)


def _check_usage(given: argparse.Namespace) -> None:
    """Raise a ConfigError for arguments that do not go together."""
    wrong = None
    if given.adapter is None and given.checkpoint is None:
        wrong = "CHECKPOINT: not given"
    elif given.adapter is not None and given.checkpoint is not None:
        wrong = f"--adapter: given with CHECKPOINT {given.checkpoint}"
    elif given.adapter is not None and not given.merge:
        wrong = "--adapter: given without --merge"
    elif given.adapter is not None and given.raw:
        wrong = "--raw: given with --adapter"
    elif given.adapter is None and given.merge:
        wrong = "--merge: given without --adapter"
    elif given.adapter is None and given.base_dtype is not None:
        wrong = "--base-dtype: given without --adapter"
    if wrong is not None:
        raise ConfigError(f"{wrong}; {USAGES}. A PEFT folder itself is copied as CHECKPOINT.")


def _export_merged(given: argparse.Namespace) -> int:
    out = place("--out", given.out)
    adapter = read_adapter(name_or_folder("--adapter", given.adapter))
    name = adapter.base if given.base is None else name_or_folder("--base", given.base)
    if name is None:
        raise ConfigError(
            f"--base: not given, and {adapter.where} does not name its base. Expected the folder "
            "or hub name of the model that the adapter was trained on."
        )
    base = resolve_pretrained(name, cache_dir=None, weights=True)
    dtype = None if given.dtype is None else DTYPES[given.dtype]
    parts = given.parts or "text"
    export_merged(Merge(adapter, base, name, dtype, given.base_dtype, parts), out, _say)
    return 0


def _export_checkpoint(given: argparse.Namespace) -> int:
    out = place("--out", given.out)
    source = place("CHECKPOINT", given.checkpoint)
    if not is_url(source) and (Path(source) / CERTIFICATE).is_file():
        if given.dtype or given.base is not None or given.raw or given.parts:
            raise ConfigError(
                f"--dtype, --base, --raw, --parts: given with {source}, which is an export and is "
                "copied as it is. Leave them out, or name a checkpoint."
            )
        send_export(Path(source), out, _say)
        return 0
    storage, name = find_checkpoint(source, _say)
    dtype = None if given.dtype is None else DTYPES[given.dtype]
    base = base_weights(given.base)
    export_checkpoint(
        storage,
        name,
        out,
        choice=Choice(dtype, not given.raw, given.parts),
        base=base,
        say=_say,
    )
    return 0
