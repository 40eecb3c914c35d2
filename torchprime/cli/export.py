"""`torchprime export CHECKPOINT --out DIR` and `torchprime verify DIR`.

The first makes a Hugging Face folder from a run's checkpoint, the second checks such a folder
against its certificate. Neither needs an accelerator. The work is done in
torchprime/checkpoint/from_checkpoint.py and torchprime/checkpoint/proof/recheck.py.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from torchprime.checkpoint.from_checkpoint import export_checkpoint, find_checkpoint, send_export
from torchprime.checkpoint.hf.source import resolve_pretrained
from torchprime.checkpoint.proof.certificate import CERTIFICATE, Certificate, Check, tally
from torchprime.checkpoint.proof.recheck import recheck
from torchprime.cli.shared.arguments import make_parser, run_command
from torchprime.config.paths import is_url, local_path, name_or_folder, place
from torchprime.errors import ConfigError
from torchprime.terminal import print_lines

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
MARKS = {True: "passed", False: "FAILED", None: "not made"}
EXPORT_EPILOG = """\
CHECKPOINT is a folder or URL: RUN/checkpoints/step_00000600, RUN/checkpoints/best, or RUN for the
newest whole one. The folder of an export is copied as it is. Exit code: 0; 2 if nothing was
exported, or a check of the certificate failed.
"""
VERIFY_EPILOG = """\
Exit code: 0 all that can be checked passes; 1 something fails; 2 no certificate, or a mistake.
A certificate is no signature: it does not tell who made it.
"""


def export_main(argv: list[str]) -> int:
    """Run `export` with the arguments after it; return the exit code."""
    parser = make_parser(
        "torchprime export", "Make a Hugging Face folder of a run's checkpoint.", EXPORT_EPILOG
    )
    add = parser.add_argument
    add("checkpoint", metavar="CHECKPOINT")
    add("--out", metavar="DIR", required=True, help="new folder or URL; if there, it is empty")
    add("--dtype", choices=list(DTYPES), help="of the weights (default: as they were trained)")
    add("--base", metavar="FOLDER", help="the base's weights, if they lie elsewhere by now")
    return run_command(parser, argv, _export)


def verify_main(argv: list[str]) -> int:
    """Run `verify` with the arguments after it; return the exit code."""
    parser = make_parser("torchprime verify", "Check an export by its certificate.", VERIFY_EPILOG)
    add = parser.add_argument
    add("folder", metavar="DIR")
    add("--base", metavar="FOLDER", help="the base's weights (folder or hub name), to compare with")
    return run_command(parser, argv, _verify)


def _say(line: str) -> None:
    print_lines([line], "backslashreplace")


def _base(given: str | None) -> Path | None:
    if given is None:
        return None
    return resolve_pretrained(name_or_folder("--base", given), cache_dir=None, weights=True)


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
    export_checkpoint(storage, name, out, dtype=dtype, base=_base(given.base), say=_say)
    return 0


def _verify(given: argparse.Namespace) -> int:
    certificate, checks = recheck(local_path("DIR", given.folder), _base(given.base))
    print_lines(_report(given.folder, certificate, checks), "backslashreplace")
    return 1 if any(check.passed is False for check in checks) else 0


def _report(folder: str, certificate: Certificate, checks: list[Check]) -> list[str]:
    width = max(len(check.name) for check in checks)
    lines = [f"{folder}: {certificate.origin}"]
    for check in checks:
        lines.append(f"  {MARKS[check.passed]:<8}  {check.name:<{width}}  {check.detail}")
    failed = any(check.passed is False for check in checks)
    return [*lines, f"{'FAILED' if failed else 'VERIFIED'}: {tally(checks)}"]
