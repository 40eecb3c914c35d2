"""The frame of every entry point: composes the config, returns an exit code, reports user errors.

if __name__ == "__main__":
    sys.exit(run_main(main))
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Sequence

from torchprime.config.command_line import Command, parse_command
from torchprime.config.compose import Fill, compose_config
from torchprime.config.many_runs.further import FurtherRuns
from torchprime.config.many_runs.jobs import compose_jobs, read_multirun
from torchprime.config.many_runs.processes import run_jobs, this_program
from torchprime.config.schema import TrainConfig
from torchprime.text.terminal import reported

Sweep = Callable[[Command, Sequence[str]], int]


def run_main(
    main: Callable[[TrainConfig], int],
    argv: list[str] | None = None,
    program: Callable[[], list[str]] | None = None,
    sweep: Sweep | None = None,
    fill: Fill | None = None,
) -> int:
    """Compose the config from the command line, run `main` with it and return the exit code.

    In a process that a sweep started, further runs may follow the first.

    Args:
        argv: flags and overrides; this process' if not given.
        program: returns the command that starts one run of a sweep, up to the run's own flags and
            overrides; if not given, this process' command up to `argv`.
        sweep: makes the runs of a command with -m, which trains; gets that program. If not given,
            the runs are made one after another, each in its process.
        fill: as in `compose_config`.
    """
    given = sys.argv[1:] if argv is None else argv

    def run() -> int:
        command = parse_command(given)
        if not command.many_runs:
            return main(compose_config(given, fill))
        started_by = this_program(given) if program is None else program()
        if sweep is not None:
            return sweep(command, started_by)
        read_multirun(command).require_basic()
        return run_jobs(compose_jobs(command), started_by)

    further = FurtherRuns.from_environment()
    code = reported(run)
    own_words = sys.argv[: len(sys.argv) - len(given)]
    while further is not None and (next_run := further.after(code)) is not None:
        sys.argv, following = [*own_words, *next_run], next_run
        gc.collect()  # the weights of the run before
        code = reported(lambda argv=following: main(compose_config(argv, fill)))
    return code
