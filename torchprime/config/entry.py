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
from torchprime.errors import INTERRUPTED, StoppedError, UserError, told_disk_fault
from torchprime.terminal import guard_output, say


def run_main(main: Callable[[TrainConfig], int], argv: list[str] | None = None) -> int:
    """Compose the config from the command line, run `main` with it and return the exit code."""
    guard_output()
    argv = sys.argv[1:] if argv is None else argv
    try:
        command = parse_command(argv)
        if command.many_runs:
            program = this_program(argv)
            return run_jobs(compose_jobs(command), program)
        return main(compose_config(argv))
    except StoppedError as stop:
        say(f"stopped: {stop}")
        return stop.exit_code
    except UserError as error:
        say(f"error: {error}")
        return error.exit_code
    except OSError as error:
        if (told := told_disk_fault(error)) is None:
            raise
        say(f"error: {told}")
        return UserError.exit_code
    except KeyboardInterrupt:
        say("interrupted")
        return INTERRUPTED
