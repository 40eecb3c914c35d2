"""Shell completion by Hydra: `eval "$(torchprime --shell-completion install=bash)"`.

Hydra completes a run's groups, options and keys. It does not know our commands and flags, so it
gets the line without them.
"""

from __future__ import annotations

import os
from collections.abc import Collection

from torchprime.config.entry import run_main
from torchprime.text.terminal import print_lines

FLAGS = ("-sc", "--shell-completion")


def complete(argv: list[str], commands: Collection[str], of_runs: Collection[str]) -> int:
    """Answer a shell, or print the script that makes it ask; the exit code.

    Args:
        argv: one of FLAGS, and what Hydra takes after it.
        of_runs: the commands that take a config's overrides.
    """
    asks = any(word.startswith("query=") for word in argv)
    if asks:
        program, *words = os.environ.get("COMP_LINE", "").split() or [""]
        begun = "" if os.environ.get("COMP_LINE", "").endswith(" ") or not words else words.pop()
        if not words:
            print_lines([" ".join(commands)])
            return 0
        if words[0] not in of_runs or begun.startswith("-") or words[-1].startswith("-"):
            return 0  # the shell offers files
        os.environ["COMP_LINE"] = f"{program} {begun}"
    return run_main(lambda config: 0, argv)
