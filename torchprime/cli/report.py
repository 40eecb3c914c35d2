"""`torchprime report RUN [--out DIR]`: the report of a run, rebuilt from the run's folder.

A run writes its report at its end. This command is for runs that were interrupted, and for folders
copied from elsewhere. torchprime/report/write.py makes the report.
"""

from __future__ import annotations

import argparse

from torchprime.cli.shared.arguments import make_parser, run_command
from torchprime.config.paths import local_path
from torchprime.report.write import write_report
from torchprime.text.terminal import print_lines

EPILOG = """\
RUN is a folder, <output_dir>/<run_name>. Exit code: 0; 2 if a file of it is missing or damaged.
"""


def report_main(argv: list[str]) -> int:
    """Run `report` with the arguments after it; return the exit code."""
    parser = make_parser("torchprime report", "Write report.md and report.html of a run.", EPILOG)
    parser.add_argument("run", metavar="RUN")
    parser.add_argument(
        "--out", metavar="DIR", help="folder of the report (default: the run's folder)"
    )
    return run_command(parser, argv, _report)


def _report(given: argparse.Namespace) -> int:
    out = None if given.out is None else local_path("--out", given.out)
    paths = write_report(local_path("RUN", given.run), out)
    print_lines(map(str, paths), "backslashreplace")
    return 0
