"""The frame of a command with its own arguments: it returns an exit code and reports user errors.

Imports are light: experimental/vllm_tpu_deployment uses it in an environment without Hydra.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

from torchprime.text.terminal import reported, say

# Hydra's flags that take a value, with their short forms.
CONFIG_FLAGS = {
    **dict.fromkeys(("--config-name", "-cn"), "--config-name"),
    **dict.fromkeys(("--config-dir", "-cd"), "--config-dir"),
    **dict.fromkeys(("--config-path", "-cp"), "--config-path"),
}


class _Parser(argparse.ArgumentParser):
    """A parser that quotes arguments in messages, because they may be file names by anybody."""

    def _print_message(self, message: str, file: Any = None) -> None:
        if message:
            say(message.rstrip("\n"), file)


def make_parser(prog: str, description: str, epilog: str) -> argparse.ArgumentParser:
    """Return a parser that prints the epilog as written and accepts no abbreviations."""
    return _Parser(
        prog=prog,
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def positive(text: str) -> int:
    """Parse an argument that is a whole number of 1 or more."""
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return value


def with_model_first(argv: Sequence[str]) -> list[str]:
    """Return a command line whose config flags are one word each (`--config-name=NAME`), so that a
    positional argument is never taken for their values."""
    words, found = iter(argv), []
    for word in words:
        name = CONFIG_FLAGS.get(word)
        value = None if name is None else next(words, None)
        found.append(word if value is None else f"{name}={value}")
    return found


def run_command(
    parser: argparse.ArgumentParser, argv: list[str], command: Callable[[argparse.Namespace], int]
) -> int:
    """Parse the arguments and run the command with them; return the exit code."""
    return _parsed(lambda: parser.parse_intermixed_args(argv), command)


def run_with_rest(
    parser: argparse.ArgumentParser,
    argv: list[str],
    command: Callable[[argparse.Namespace, list[str]], int],
) -> int:
    """Run a command with its own arguments and the rest, which a run's config takes; return the
    exit code."""
    return _parsed(lambda: parser.parse_known_args(argv), lambda both: command(*both))


def _parsed(parse: Callable[[], Any], command: Callable[[Any], int]) -> int:
    try:
        given = parse()
    except SystemExit as stop:  # argparse has printed the help or the error
        return stop.code if isinstance(stop.code, int) else 2
    return reported(lambda: command(given))
