"""The frame of every entry point: composes the config, returns an exit code, reports user errors.

if __name__ == "__main__":
    sys.exit(run_main(main))
"""

from __future__ import annotations

import sys
from collections.abc import Callable

from torchprime.config.compose import compose_config, compose_jobs, parse_command
from torchprime.config.schema import TrainConfig
from torchprime.config.sweep import run_jobs, this_program
from torchprime.text.terminal import reported


def run_main(
    main: Callable[[TrainConfig], int],
    argv: list[str] | None = None,
    program: Callable[[], list[str]] | None = None,
) -> int:
    """Compose the config from the command line, run `main` with it and return the exit code.

    Args:
        argv: flags and overrides; this process' if not given.
        program: returns the command that starts one run of a sweep, up to the run's own flags and
            overrides; if not given, this process' command up to `argv`.
    """
    given = sys.argv[1:] if argv is None else argv

    def run() -> int:
        command = parse_command(given)
        if command.many_runs:
            started_by = this_program(given) if program is None else program()
            return run_jobs(compose_jobs(command), started_by)
        return main(compose_config(given))

    return reported(run)
