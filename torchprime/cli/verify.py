"""`torchprime verify DIR`: an export, checked by the certificate in it.

It needs no accelerator. torchprime/checkpoint/proof/recheck.py makes the checks.
"""

from __future__ import annotations

import argparse

from torchprime.checkpoint.adapter.recheck import recheck_any
from torchprime.checkpoint.proof.certificate import Certificate, Check, tally
from torchprime.cli.shared.arguments import make_parser, run_command
from torchprime.cli.shared.base import base_weights
from torchprime.config.paths import local_path
from torchprime.text.terminal import print_lines

MARKS = {True: "passed", False: "FAILED", None: "not made"}
EPILOG = """\
Exit code: 0 all that can be checked passes; 1 something fails; 2 no certificate, or a user error.
A certificate is not a signature: it does not say who made it.
"""


def verify_main(argv: list[str]) -> int:
    """Run `verify` with the arguments after it; the exit code."""
    parser = make_parser("torchprime verify", "Check an export by its certificate.", EPILOG)
    add = parser.add_argument
    add("folder", metavar="DIR")
    add("--base", metavar="FOLDER", help="the base's weights (folder or hub name), to compare with")
    return run_command(parser, argv, _verify)


def _verify(given: argparse.Namespace) -> int:
    certificate, checks = recheck_any(local_path("DIR", given.folder), base_weights(given.base))
    print_lines(_report(given.folder, certificate, checks), "backslashreplace")
    return 1 if any(check.passed is False for check in checks) else 0


def _report(folder: str, certificate: Certificate, checks: list[Check]) -> list[str]:
    width = max(len(check.name) for check in checks)
    lines = [f"{folder}: {certificate.origin}"]
    for check in checks:
        lines.append(f"  {MARKS[check.passed]:<8}  {check.name:<{width}}  {check.detail}")
    failed = any(check.passed is False for check in checks)
    return [*lines, f"{'FAILED' if failed else 'VERIFIED'}: {tally(checks)}"]
