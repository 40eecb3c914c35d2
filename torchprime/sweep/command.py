"""The door of the sweep for the training commands: light, since most of them make one run."""

from __future__ import annotations

import os
from collections.abc import Sequence

from torchprime.config.command_line import Command
from torchprime.config.many_runs.jobs import read_multirun


def run_sweep(command: Command, program: Sequence[str]) -> int:
    """Make the runs of a command with -m and the sweep's table; return the first nonzero exit code.

    Args:
        program: the command line that starts a run, up to the run's own arguments.

    Raises:
        UserError: as `make_sweep`.
    """
    many = read_multirun(command)
    os.environ["USE_TORCH_XLA"] = "0"  # transformers would start XLA in this process
    # late: it takes seconds, which one run does not need
    from torchprime.sweep.run import make_sweep

    return make_sweep(many, program)
