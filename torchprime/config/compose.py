"""Composition of a command line to a TrainConfig, with Hydra's grammar and our messages.

Hydra finds the YAML files (the user's `--config-dir` first, then ours), merges groups and applies
overrides to the schema's defaults; load.py then makes the result a TrainConfig. A run uses Hydra's
compose API, so Hydra makes no `outputs/` folder or log file and keeps the working directory. Flags
that only show something (`--cfg job`, `--help`, `--info`, ...) go to a real `hydra.main`, so that
they act as Hydra's users expect. So does `-m`, whose sweeper lists the runs (sweep.py).

torch is not imported here: the entry point sets up the XLA environment from the config first.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import hydra
import yaml
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.core.plugins import Plugins
from hydra.errors import (
    ConfigCompositionException,
    HydraException,
    MissingConfigException,
    OverrideParseException,
)
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

import torchprime
from torchprime.config.load import (
    free_sections,
    known_keys,
    load_config,
    missing_message,
    nearest,
    schema_defaults,
    unknown_key_message,
)
from torchprime.config.other_names import advice_for
from torchprime.config.overrides import in_full, quoted, refuse_hydras
from torchprime.config.paths import local_path
from torchprime.config.schema import TrainConfig
from torchprime.errors import ConfigError, UserError

DEFAULT_CONFIG = "default"
SCHEMA_NODE = "torchprime_schema"
_PACKAGE = Path(torchprime.__file__).resolve().parent
_HYDRA_VERSION = "1.3"


def configs_dir() -> Path:
    """Return the folder of our YAML files: in an installed package, else at the repo's top."""
    packaged = _PACKAGE / "configs"
    return packaged if packaged.is_dir() else _PACKAGE.parent / "configs"


def assets_dir() -> Path:
    """Return the folder of the model and rows in the package: `${torchprime:assets}` in YAML."""
    return _PACKAGE / "assets"


def compose_config(argv: list[str]) -> TrainConfig:
    """Compose the config of a command line (without the program's name).

    Flags that only show something print it and exit with SystemExit.
    """
    command = parse_command(argv)
    if command.many_runs:
        raise ConfigError("-m: given to a command that makes one run. Leave -m out.")
    if command.shows:
        _run_hydra_main(command, lambda _: None)
        raise SystemExit(0)
    return _finish(_compose(command), command.config_name)


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
        config_dir=_user_folder(given.config_dir),
        overrides=[in_full(text, many_runs=many_runs) for text in given.overrides],
        flags=flags,
        many_runs=many_runs,
    )


def _user_folder(given: str | None) -> Path | None:
    if given is None:
        return None
    folder = local_path("--config-dir", given).resolve()
    if not folder.is_dir():
        raise ConfigError(
            f"--config-dir: given {given!r}, expected a folder of configs, but {folder} is none. "
            "Give its path, absolute or relative to where you are."
        )
    return folder


@dataclass(frozen=True)
class Job:
    """One of several runs: its own command line (without the program's name), and its config."""

    argv: list[str]
    overrides: list[str]
    config: TrainConfig


def compose_jobs(command: Command) -> list[Job]:
    """Compose and check every run of a command with -m; none has started."""
    jobs: list[Job] = []

    def collect(composed: DictConfig) -> None:
        config = _finish(composed, f"{command.config_name}_{len(jobs)}")
        given = [str(each) for each in HydraConfig.get().overrides.task]
        argv = ["--config-name", command.config_name, *given]
        if command.config_dir is not None:
            argv[:0] = ["--config-dir", str(command.config_dir)]
        if composed.get("run_name") is None:
            argv.append(f"run_name={quoted(str(config.run_name))}")
        jobs.append(Job(argv, given, config))

    _run_hydra_main(command, collect)
    return jobs


def _run_hydra_main(command: Command, take: Callable[[DictConfig], None]) -> None:
    """Pass a command to hydra.main; `take` is called for each job of a multirun.

    An error in one job ends all jobs and is raised here, outside of Hydra, which would print a
    traceback.
    """
    mistakes: list[UserError] = []

    def job(composed: DictConfig) -> None:
        try:
            take(composed)
        except UserError as error:
            mistakes.append(error)
            raise SystemExit(error.exit_code) from None

    if command.composes:
        _compose(command)  # for its messages: hydra.main would print its own
    elif command.many_runs:
        _parse_overrides(command)
    wrapped = hydra.main(
        version_base=_HYDRA_VERSION, config_path=str(configs_dir()), config_name=DEFAULT_CONFIG
    )(job)
    flags = ["--multirun"] if command.many_runs else command.flags
    before = sys.argv
    try:
        with TemporaryDirectory() as scratch, _user_configs_first(command.config_dir):
            name = ["--config-name", command.config_name]
            sys.argv = [before[0], *flags, *name, *command.overrides, *_quiet(scratch)]
            wrapped()
    except SystemExit:
        if mistakes:
            raise mistakes[0] from None
        raise
    finally:
        sys.argv = before


def _quiet(scratch: str) -> list[str]:
    """Stop Hydra from making an output folder and a log file: a run has its own folder."""
    return [
        "hydra.run.dir=.",
        f"hydra.sweep.dir='{scratch}'",
        "hydra.output_subdir=null",
        "hydra/job_logging=none",
        "hydra/hydra_logging=none",
        "hydra.help.app_name=torchprime",
    ]


class _UserConfigs(SearchPathPlugin):
    """A search path with the user's folder first, so that a user's config replaces ours."""

    folder: Path | None = None

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        if self.folder is not None:
            search_path.prepend(provider="--config-dir", path=f"file://{self.folder}")


@contextmanager
def _user_configs_first(folder: Path | None) -> Iterator[None]:
    Plugins.instance().register(_UserConfigs)
    ConfigStore.instance().store(name=SCHEMA_NODE, node=schema_defaults(), provider="torchprime")
    OmegaConf.register_new_resolver("torchprime", _resolve_path, replace=True)
    _UserConfigs.folder = folder
    try:
        yield
    finally:
        _UserConfigs.folder = None


def _resolve_path(name: str) -> str:
    folders = {"assets": assets_dir(), "configs": configs_dir()}
    if name not in folders:
        raise ConfigError(
            f"${{torchprime:{name}}}: given {name!r}, expected one of {', '.join(folders)}. "
            f"Write ${{torchprime:assets}}."
        )
    return str(folders[name])


def _compose(command: Command) -> DictConfig:
    """Compose with Hydra, and turn exceptions of Hydra and OmegaConf into ours."""
    overrides = _parse_overrides(command)
    GlobalHydra.instance().clear()
    try:
        with (
            _user_configs_first(command.config_dir),
            hydra.initialize_config_dir(str(configs_dir()), version_base=_HYDRA_VERSION),
        ):
            return hydra.compose(command.config_name, command.overrides)
    except MissingConfigException as error:
        raise ConfigError(_missing_config_message(error, command)) from error
    except (HydraException, OmegaConfBaseException) as error:
        message = _free_key_message(error, overrides, command) or _composition_message(error)
        raise ConfigError(message) from error
    except yaml.YAMLError as error:
        raise ConfigError(f"YAML cannot be read: {error}") from error


def _finish(composed: DictConfig, default_run_name: str) -> TrainConfig:
    try:
        config = load_config(composed)
    except MissingMandatoryValue as error:
        raise ConfigError(missing_message([str(error.full_key)])) from error
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key}: {_first_line(error)}") from error
    if config.run_name is None:
        return replace(config, run_name=default_run_name.replace("/", "_"))
    return config


def _parse_overrides(command: Command) -> list[Override]:
    """Parse overrides with Hydra's grammar, and check that the schema has each changed key."""
    groups, keys = _groups(command.config_dir), known_keys()
    for text in command.overrides:
        if "=" not in text and not text.startswith("~"):
            close = nearest(text, [*keys, *groups])
            advice = f"Did you mean {close}=...?" if close else "Write task.max_steps=100, say."
            raise ConfigError(f"{text}: given without '=', expected key=value. {advice}")
    try:
        parsed = OverridesParser.create().parse_overrides(command.overrides)
    except OverrideParseException as error:
        raise ConfigError(
            f"{error.override}: cannot be read as key=value ({_first_line(error)}). Quote special "
            "characters: 'key=\"a, b\"'."
        ) from error
    for override in parsed:
        key = override.key_or_group
        if override.is_sweep_override() and not command.many_runs:
            raise ConfigError(
                f"{override.input_line}: given several values, expected one. For a list write "
                f"{key}=[...]; for one run per value add -m."
            )
        if key.startswith(("hydra.", "hydra/")):
            given = "" if override.value_type is None else override.get_value_string()
            refuse_hydras(key, given, uses_hydra=command.many_runs or bool(command.flags))
        if key in groups or key.startswith("hydra.") or "/" in key:
            continue
        if any(key.startswith(f"{section}.") for section in free_sections()):
            continue
        if key not in keys and "@" not in key:
            raise ConfigError(_unknown_override(override, groups))
    return parsed


def _unknown_override(override: Override, groups: list[str]) -> str:
    key = override.key_or_group
    given = "" if override.value_type is None else override.get_value_string()
    if (advice := advice_for(key)) is not None:
        return f"{key}: given {given!r}, but there is no such key. {advice}"
    group = nearest(key, groups) if "." not in key else None
    if group is not None and nearest(key, [group, *known_keys()]) == group:
        return (
            f"{key}: given {given!r}, but there is no such key or group. "
            f"Did you mean {group}={given}?"
        )
    return unknown_key_message(key, given)


def _groups(user_folder: Path | None) -> list[str]:
    """Return the groups: the folders of configs from which an option is chosen."""
    folders = [folder for folder in (user_folder, configs_dir()) if folder is not None]
    return sorted(
        {
            path.name
            for folder in folders
            for path in folder.iterdir()
            if path.is_dir() and any(path.glob("*.yaml"))
        }
    )


def is_group(key: str, user_folder: str | None) -> bool:
    """Return True for a group from which an option is chosen, False for a key."""
    return key in _groups(_user_folder(user_folder))


def _options(command: Command, group: str) -> list[str]:
    folders = [command.config_dir, configs_dir()]
    return sorted(
        {path.stem for folder in folders if folder for path in (folder / group).glob("*.yaml")}
    )


def _missing_config_message(error: MissingConfigException, command: Command) -> str:
    missing = error.missing_cfg_file
    name = missing if isinstance(missing, str) else command.config_name
    name = name.removesuffix(".yaml")
    group, _, option = name.rpartition("/")
    options = [each for each in _options(command, group) if each != SCHEMA_NODE]
    close = nearest(option, options)
    if name == command.config_name:
        key, written, kind = "--config-name", f"--config-name {close}", "a config"
    else:
        key, written, kind = group or "defaults", f"{group}={close}", "an option"
    advice = f"Did you mean {written}? " if close else ""
    listing = ", ".join(options) or "none"
    return (
        f"{key}: given {option!r}, but there is no such config. {advice}Expected {kind} of: "
        f"{listing}. For your own, add --config-dir with its folder."
    )


def _free_key_message(error: Exception, overrides: list[Override], command: Command) -> str | None:
    """Return the message for an unknown key in a section of free keys (an architecture)."""
    for override in overrides:
        key, line = override.key_or_group, override.input_line
        section = next((each for each in free_sections() if key.startswith(f"{each}.")), None)
        changes = override.type is OverrideType.CHANGE
        if section is None or line is None or line not in str(error) or not changes:
            continue
        others = [each for each in command.overrides if each != line]
        present = OmegaConf.select(_compose(replace(command, overrides=others)), section) or {}
        close = nearest(key, [f"{section}.{name}" for name in present])
        advice = f"Did you mean {close}? " if close else ""
        return (
            f"{key}: given {override.value()!r}, but {section} has no such key in this config. "
            f"{advice}To add it, write +{line}."
        )
    return None


def _composition_message(error: Exception) -> str:
    """Return Hydra's own message on one line, and the place of the fault."""
    cause = error.__cause__ if isinstance(error, ConfigCompositionException) else None
    line = _first_line(error)
    if cause is not None and _first_line(cause) not in line:
        line += f" ({_first_line(cause)})"
    return f"config: {line}. Run with --info defaults to see which files are merged."


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else type(error).__name__
