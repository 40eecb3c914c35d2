"""`torchprime export CHECKPOINT --out DIR` and `torchprime verify DIR`.

The first makes a Hugging Face folder of a run's checkpoint, the second checks such a folder by the
certificate in it. Neither needs an accelerator. torchprime/checkpoint/from_checkpoint.py and
recheck.py say how.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from torchprime.checkpoint.certificate import Certificate, Check, tally
from torchprime.checkpoint.from_checkpoint import export_checkpoint, find_checkpoint
from torchprime.checkpoint.recheck import recheck
from torchprime.checkpoint.source import resolve_pretrained
from torchprime.cli.arguments import make_parser, run_command
from torchprime.terminal import print_lines

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
MARKS = {True: "passed", False: "FAILED", None: "not made"}
EXPORT_EPILOG = """\
CHECKPOINT is a folder or URL: RUN/checkpoints/step_00000600, RUN/checkpoints/best, or RUN for the
newest whole one. Exit code: 0; 2 if nothing was exported, or a check of the certificate failed.
"""
VERIFY_EPILOG = """\
Exit code: 0 all that can be checked passes; 1 something fails; 2 no certificate, or a mistake.
A certificate is no signature: it does not tell who made it.
"""


def export_main(argv: list[str]) -> int:
    """Run `export` with the arguments after it; the exit code."""
    parser = make_parser(
        "torchprime export", "Make a Hugging Face folder of a run's checkpoint.", EXPORT_EPILOG
    )
    add = parser.add_argument
    add("checkpoint", metavar="CHECKPOINT")
    add("--out", metavar="DIR", required=True, help="the new folder; must not exist, or be empty")
    add("--dtype", choices=list(DTYPES), help="of the weights (default: as they were trained)")
    add("--base", metavar="FOLDER", help="the base's weights, if they lie elsewhere by now")
    return run_command(parser, argv, _export)


def verify_main(argv: list[str]) -> int:
    """Run `verify` with the arguments after it; the exit code."""
    parser = make_parser("torchprime verify", "Check an export by its certificate.", VERIFY_EPILOG)
    add = parser.add_argument
    add("folder", metavar="DIR")
    add("--base", metavar="FOLDER", help="the base's weights (folder or hub name), to compare with")
    return run_command(parser, argv, _verify)


def _say(line: str) -> None:
    print_lines([line], "backslashreplace")


def _base(given: str | None) -> Path | None:
    return None if given is None else resolve_pretrained(given, cache_dir=None, weights=True)


def _export(given: argparse.Namespace) -> int:
    storage, name = find_checkpoint(given.checkpoint, _say)
    dtype = None if given.dtype is None else DTYPES[given.dtype]
    export_checkpoint(storage, name, Path(given.out), dtype=dtype, base=_base(given.base), say=_say)
    return 0


def _verify(given: argparse.Namespace) -> int:
    certificate, checks = recheck(Path(given.folder), _base(given.base))
    print_lines(_report(given.folder, certificate, checks), "backslashreplace")
    return 1 if any(check.passed is False for check in checks) else 0


def _report(folder: str, certificate: Certificate, checks: list[Check]) -> list[str]:
    width = max(len(check.name) for check in checks)
    lines = [f"{folder}: {certificate.origin}"]
    for check in checks:
        lines.append(f"  {MARKS[check.passed]:<8}  {check.name:<{width}}  {check.detail}")
    failed = any(check.passed is False for check in checks)
    return [*lines, f"{'FAILED' if failed else 'VERIFIED'}: {tally(checks)}"]
