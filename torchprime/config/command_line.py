"""A command line of flags and overrides, parsed with all checks that need no YAML."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from torchprime.config.overrides import in_full
from torchprime.config.paths import local_path
from torchprime.errors import ConfigError

DEFAULT_CONFIG = "default"


@dataclass(frozen=True)
class Command:
    """A parsed command line."""

    config_name: str
    config_dir: Path | None
    overrides: list[str]
    flags: list[str]  # for hydra.main, in its own spelling
    many_runs: bool

    @property
    def shows(self) -> bool:
        """Return True if the command prints something instead of running."""
        return bool(self.flags) and not self.many_runs

    @property
    def composes(self) -> bool:
        """Return True if the printed text is made from the composed config."""
        return "--cfg" in self.flags or "--info" in self.flags


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:  # type: ignore[override]
        raise ConfigError(f"command line: {message}. See --help.")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--config-name", "-cn", default=DEFAULT_CONFIG)
    parser.add_argument("--config-dir", "-cd")
    parser.add_argument("--cfg", "-c", choices=["job", "hydra", "all"])
    parser.add_argument("--package", "-p")
    parser.add_argument("--info", "-i", nargs="?", const="all")
    for flag in (
        ["--resolve"],
        ["--help", "-h"],
        ["--hydra-help"],
        ["--version"],
        ["--shell-completion", "-sc"],
        ["--run", "-r"],
        ["--multirun", "-m"],
    ):
        parser.add_argument(*flag, action="store_true")
    return parser


def parse_command(argv: list[str]) -> Command:
    """Parse flags and overrides in any order, with all checks that need no YAML."""
    given, unknown = _parser().parse_known_intermixed_args(argv)
    if unknown:
        word = unknown[0].lstrip("-")
        if "=" in word:
            raise ConfigError(
                f"{unknown[0]}: given with dashes, expected an override without. Write {word}."
            )
        raise ConfigError(
            f"{unknown[0]}: no such flag. Expected --config-name, --config-dir, --cfg job, --info, "
            "--help or -m; overrides are written key=value."
        )
    if given.info is not None and "=" in given.info:  # an override after a bare --info
        given.overrides.insert(0, given.info)
        given.info = "all"
    flags: list[str] = []
    for name in ("cfg", "package", "info"):
        if getattr(given, name) is not None:
            flags += [f"--{name}", getattr(given, name)]
    for name in ("resolve", "help", "hydra_help", "version", "shell_completion"):
        if getattr(given, name):
            flags.append("--" + name.replace("_", "-"))
    if {"--package", "--resolve"} & set(flags) and "--cfg" not in flags:
        raise ConfigError("--package and --resolve: expected together with --cfg job. Add it.")
    many_runs = given.multirun and not flags
    return Command(
        config_name=given.config_name,
        config_dir=user_folder(given.config_dir),
        overrides=[in_full(text, many_runs=many_runs) for text in given.overrides],
        flags=flags,
        many_runs=many_runs,
    )


def user_folder(given: str | None) -> Path | None:
    if given is None:
        return None
    folder = local_path("--config-dir", given).resolve()
    if not folder.is_dir():
        raise ConfigError(
            f"--config-dir: given {given!r}, expected a folder of configs, but {folder} is none. "
            "Give its path, absolute or relative to where you are."
        )
    return folder
