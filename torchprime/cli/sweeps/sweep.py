"""`torchprime sweep report DIR [DIR ...] [--out FOLDER]`: the table of runs, made again.

`torchprime train -m` writes it at the end of a sweep. This command is for a sweep that was killed,
and for runs that no sweep made. torchprime/sweep/write.py writes the files.
"""

from __future__ import annotations

import argparse

from torchprime.cli.shared.arguments import make_parser, run_command
from torchprime.config.paths import local_path
from torchprime.errors import ConfigError
from torchprime.sweep.write import summary_lines, write_sweep
from torchprime.text.terminal import print_lines

EPILOG = """\
DIR is a sweep's folder, another folder of runs, or a run's folder. The files are sweep.json,
sweep.md, sweep.html, curves.svg and winner.yaml.

Exit code: 0; 2 if there is no run.
"""


def sweep_main(argv: list[str]) -> int:
    """Run `sweep` with the arguments after it; return the exit code."""
    parser = make_parser("torchprime sweep", "Compare the results of several runs.", EPILOG)
    parser.add_argument("what", choices=["report"])
    parser.add_argument("folders", metavar="DIR", nargs="+")
    parser.add_argument("--out", metavar="FOLDER", help="folder of the result (default: DIR)")
    return run_command(parser, argv, _report)


def _report(given: argparse.Namespace) -> int:
    places = [local_path("DIR", each) for each in given.folders]
    if given.out is None and len(places) > 1:
        raise ConfigError(
            f"--out: given nothing with {len(places)} folders, expected a folder for the result. "
            "Add --out FOLDER."
        )
    out = places[0] if given.out is None else local_path("--out", given.out)
    print_lines(summary_lines(write_sweep(places, out), out), "backslashreplace")
    return 0
