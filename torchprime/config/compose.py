"""Composition of a command line to a TrainConfig, with Hydra's grammar and our messages.

Hydra finds the YAML files (the user's `--config-dir` first, then ours), merges groups and applies
overrides to the schema's defaults; load.py then makes the result a TrainConfig. A run uses Hydra's
compose API, so Hydra makes no `outputs/` folder or log file and keeps the working directory. Flags
that only show something (`--cfg job`, `--help`, `--info`, ...) go to a real `hydra.main`, so that
they act as Hydra's users expect. So does `-m` (many_runs/).

torch is not imported here: the entry point sets up the XLA environment from the config first.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import hydra
import yaml
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
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
from torchprime.config.command_line import (
    DEFAULT_CONFIG,
    Command,
    parse_command,
    user_folder,
)
from torchprime.config.hydra_plugins import missing_plugin
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
from torchprime.config.overrides import quoted, refuse_hydras
from torchprime.config.schema import TrainConfig
from torchprime.errors import ConfigError

SCHEMA_NODE = "torchprime_schema"
_PACKAGE = Path(torchprime.__file__).resolve().parent
HYDRA_VERSION = "1.3"
FULL_ERROR = "HYDRA_FULL_ERROR"
Fill = Callable[[DictConfig], None]


def configs_dir() -> Path:
    """Return the folder of our YAML files: in an installed package, else at the repo's top."""
    packaged = _PACKAGE / "configs"
    return packaged if packaged.is_dir() else _PACKAGE.parent / "configs"


def assets_dir() -> Path:
    """Return the folder of the model and rows in the package: `${torchprime:assets}` in YAML."""
    return _PACKAGE / "assets"


def compose_config(argv: list[str], fill: Fill | None = None) -> TrainConfig:
    """Compose the config of a command line (without the program's name).

    Flags that only show something print it and exit with SystemExit.

    Args:
        fill: sets values that the command itself knows, before the config is checked.
    """
    command = parse_command(argv)
    if command.many_runs:
        raise ConfigError("-m: given to a command that makes one run. Leave -m out.")
    if command.shows:
        _show(command)
        raise SystemExit(0)
    composed = compose_command(command)
    if fill is not None:
        fill(composed)
    return finish_config(composed, command.config_name)


def run_hydra_main(
    command: Command, task: Callable[[DictConfig], Any], settings: Sequence[str]
) -> None:
    """Pass a command to hydra.main; `task` is called for each run of a multirun.

    A UserError of a task that runs in this process ends all runs and is raised here, outside of
    Hydra, which would print a traceback.

    Args:
        settings: overrides of Hydra's own, after those of the command.
    """
    wrapped = hydra.main(
        version_base=HYDRA_VERSION, config_path=str(configs_dir()), config_name=DEFAULT_CONFIG
    )(task)
    flags = ["--multirun"] if command.many_runs else command.flags
    name = ["--config-name", command.config_name]
    before = sys.argv
    try:
        with _user_configs_first(command.config_dir), _raising(command.many_runs):
            sys.argv = [before[0], *flags, *name, *command.overrides, *settings]
            wrapped()
    finally:
        sys.argv = before


@contextmanager
def _raising(many_runs: bool) -> Iterator[None]:
    """Let hydra.main raise the exceptions of several runs, which it would print."""
    before = os.environ.get(FULL_ERROR)
    if many_runs:
        os.environ[FULL_ERROR] = "1"
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(FULL_ERROR, None)
        else:
            os.environ[FULL_ERROR] = before


def _show(command: Command) -> None:
    """Let hydra.main print what a flag asks for."""
    if command.composes:
        compose_command(command)  # for its messages: hydra.main would print its own
    with TemporaryDirectory() as scratch:
        run_hydra_main(command, lambda _: None, quiet_settings(Path(scratch)))


def quiet_settings(folder: Path) -> list[str]:
    """Return the overrides that stop Hydra from making an output folder and a log file for one run,
    which has its own.

    Args:
        folder: for what a multirun writes.
    """
    return [
        "hydra.run.dir=.",
        f"hydra.sweep.dir={quoted(str(folder))}",
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
    register_folders()
    _UserConfigs.folder = folder
    try:
        yield
    finally:
        _UserConfigs.folder = None


def register_folders() -> None:
    """Make OmegaConf resolve `${torchprime:...}`, in each process that gets a composed config."""
    OmegaConf.register_new_resolver("torchprime", _resolve_path, replace=True)


def _resolve_path(name: str) -> str:
    folders = {"assets": assets_dir(), "configs": configs_dir()}
    if name not in folders:
        raise ConfigError(
            f"${{torchprime:{name}}}: given {name!r}, expected one of {', '.join(folders)}. "
            f"Write ${{torchprime:assets}}."
        )
    return str(folders[name])


def compose_command(command: Command, *, with_hydra: bool = False) -> DictConfig:
    """Compose with Hydra.

    Args:
        with_hydra: the result has Hydra's own section, too.
    """
    overrides = parse_overrides(command)
    GlobalHydra.instance().clear()
    with (
        told_plainly(command, overrides),
        _user_configs_first(command.config_dir),
        hydra.initialize_config_dir(str(configs_dir()), version_base=HYDRA_VERSION),
    ):
        return hydra.compose(command.config_name, command.overrides, return_hydra_config=with_hydra)


@contextmanager
def told_plainly(command: Command, overrides: list[Override]) -> Iterator[None]:
    """Turn exceptions of Hydra and OmegaConf into ours."""
    try:
        yield
    except MissingConfigException as error:
        raise ConfigError(_missing_config_message(error, command)) from error
    except (HydraException, OmegaConfBaseException) as error:
        message = _free_key_message(error, overrides, command) or _composition_message(error)
        raise ConfigError(message) from error
    except yaml.YAMLError as error:
        raise ConfigError(f"YAML cannot be read: {error}") from error


def finish_config(composed: DictConfig, default_run_name: str) -> TrainConfig:
    """Return the checked config; `default_run_name` is for one that names no run."""
    try:
        config = load_config(composed)
    except MissingMandatoryValue as error:
        raise ConfigError(missing_message([str(error.full_key)])) from error
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key}: {_first_line(error)}") from error
    if config.run_name is None:
        return replace(config, run_name=default_run_name.replace("/", "_"))
    return config


def parse_overrides(command: Command) -> list[Override]:
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


def _groups(own: Path | None) -> list[str]:
    """Return the groups: the folders of configs from which an option is chosen."""
    folders = [folder for folder in (own, configs_dir()) if folder is not None]
    return sorted(
        {
            path.name
            for folder in folders
            for path in folder.iterdir()
            if path.is_dir() and any(path.glob("*.yaml"))
        }
    )


def is_group(key: str, own: str | None) -> bool:
    """Return True for a group from which an option is chosen, False for a key."""
    return key in _groups(user_folder(own))


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
    if (advice_for_plugin := missing_plugin(key, option)) is not None:
        return advice_for_plugin
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
        composed = compose_command(replace(command, overrides=others))
        present = OmegaConf.select(composed, section) or {}
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
