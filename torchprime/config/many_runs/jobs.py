"""Several runs from one command (`-m`): Hydra's sweeper says which, and each gets a command of its
own.

The basic sweeper lists all runs, which are composed and checked before the first one starts. Optuna
chooses the values of a run by the results of earlier ones, so only the keys can be checked first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, IntervalSweep, Override, Sweep
from hydra.errors import OverrideParseException
from omegaconf import DictConfig, OmegaConf

from torchprime.config.checks import refuse
from torchprime.config.command_line import Command
from torchprime.config.compose import (
    compose_command,
    finish_config,
    parse_overrides,
    quiet_settings,
    run_hydra_main,
    told_plainly,
)
from torchprime.config.hydra_plugins import BASIC, LAUNCHER, OPTUNA, SWEEPER
from torchprime.config.load import known_keys
from torchprime.config.overrides import OF_SWEEPS, quoted
from torchprime.config.schema import TrainConfig
from torchprime.errors import ConfigError

DEFAULT_SWEEP_DIR = "multirun/${now:"  # the beginning of Hydra's own default
PARAMS = "hydra.sweeper.params"


@dataclass(frozen=True)
class Job:
    """One of several runs: its own command line (without the program's name), and its config."""

    argv: list[str]
    overrides: list[str]
    config: TrainConfig


@dataclass(frozen=True)
class Multirun:
    """A command with -m, checked as far as possible before its runs are known.

    Attributes:
        varied: the keys and groups that have several values.
        folder: hydra.sweep.dir, if given.
        names_runs: run_name differs between the runs.
        config: of a run with the first value of each varied key.
        hydra: Hydra's own section of the composed config.
    """

    command: Command
    varied: tuple[str, ...]
    folder: str | None
    names_runs: bool
    config: TrainConfig
    hydra: DictConfig

    @property
    def sweeper(self) -> str:
        """The chosen option of hydra/sweeper."""
        return self.hydra.runtime.choices[SWEEPER]

    @property
    def launcher(self) -> str:
        """The chosen option of hydra/launcher."""
        return self.hydra.runtime.choices[LAUNCHER]

    def require_basic(self) -> None:
        """Refuse other sweepers and launchers, for a command that does not train."""
        for group, name in ((SWEEPER, self.sweeper), (LAUNCHER, self.launcher)):
            if name != BASIC:
                fix = "Leave it out: this command makes its runs one after another."
                refuse(group, name, BASIC, fix)


def read_multirun(command: Command) -> Multirun:
    """Check a command with -m: its keys, its plugins, and the run with all first values.

    Raises:
        ConfigError: naming the key or the plugin that does not exist, or the wrong value.
    """
    given = parse_overrides(command)
    swept = [each for each in given if each.is_sweep_override()]
    plain = [each.input_line or "" for each in given if not each.is_sweep_override()]
    _require_once(given, swept)
    firsts = [text for each in swept for text in _with_first_value(each)]
    composed = compose_command(replace(command, overrides=[*plain, *firsts]), with_hydra=True)
    hydra = composed.hydra
    params = _params(hydra)
    if params:
        firsts += [text for each in params for text in _with_first_value(each)]
        composed = compose_command(replace(command, overrides=[*plain, *firsts]), with_hydra=True)
    _require_sweeper(hydra.runtime.choices[SWEEPER])
    OmegaConf.set_struct(composed, False)
    del composed["hydra"]
    name = OmegaConf.to_container(composed, resolve=False)["run_name"]  # type: ignore[index,call-overload]
    folder = OmegaConf.to_container(hydra.sweep, resolve=False)["dir"]  # type: ignore[index,call-overload]
    varied = tuple(dict.fromkeys(each.key_or_group for each in [*params, *swept]))
    return Multirun(
        command,
        varied,
        None if str(folder).startswith(DEFAULT_SWEEP_DIR) else str(hydra.sweep.dir),
        "run_name" in varied or "${" in str(name),
        finish_config(composed, command.config_name),
        hydra,
    )


def _params(hydra: DictConfig) -> list[Override]:
    """Return the overrides of hydra.sweeper.params; their keys exist."""
    params = hydra.sweeper.get("params") or {}
    texts = [f"{key}={value}" for key, value in params.items()]
    for key, value in params.items():
        name = str(key).lstrip("+~")
        if name not in known_keys() and "." in name:
            refuse(
                f"{PARAMS}.{name}",
                value,
                "a key of the run's config",
                "Run with --cfg job to see all keys.",
            )
    try:
        return OverridesParser.create().parse_overrides(texts)
    except OverrideParseException as error:
        raise ConfigError(
            f"{PARAMS}: {error.override!r} cannot be read as key=value. Write several values as "
            "1,2,3 or, for optuna, interval(1,3)."
        ) from error


def _require_once(given: Sequence[Override], swept: Sequence[Override]) -> None:
    """Refuse a key with several values that is given again: sweepers disagree on which counts."""
    for each in swept:
        lines = [other.input_line for other in given if other.key_or_group == each.key_or_group]
        if len(lines) > 1:
            raise ConfigError(
                f"{each.key_or_group}: given {len(lines)} times ({' and '.join(map(str, lines))}), "
                "expected once. Keep the one with several values."
            )


def _require_sweeper(name: str) -> None:
    if name not in (BASIC, OPTUNA):
        refuse(SWEEPER, name, f"{BASIC} or {OPTUNA}", "Leave it out for all combinations.")


def _with_first_value(override: Override) -> Iterator[str]:
    """Yield the override with the first of its values; none for a pattern of options."""
    value = override.value()
    key = override.get_key_element()
    if isinstance(value, IntervalSweep):
        yield f"{key}={value.start}"
    elif isinstance(value, Sweep):
        yield f"{key}={next(iter(override.sweep_string_iterator()))}"
    elif not isinstance(value, Glob):
        yield override.input_line or f"{key}={override.get_value_element_as_str()}"


def job_of(composed: DictConfig, command: Command, default_name: str) -> Job:
    """Return the job of a config that Hydra composed in this process.

    Raises:
        ConfigError: a value that the schema refuses.
    """
    config = finish_config(composed, default_name)
    given = [str(each) for each in HydraConfig.get().overrides.task]
    own = [] if composed.get("run_name") is not None else [name_override(str(config.run_name))]
    return Job([*beginning(command), *given, *own], given, config)


def beginning(command: Command) -> list[str]:
    """Return the flags of a run's command line."""
    flags = ["--config-name", command.config_name]
    return (
        flags if command.config_dir is None else ["--config-dir", str(command.config_dir), *flags]
    )


def name_override(name: str) -> str:
    """Return the override that names a run."""
    return f"run_name={quoted(name)}"


def compose_jobs(command: Command) -> list[Job]:
    """Compose and check every run of a command with -m; none has started."""
    jobs: list[Job] = []

    def collect(composed: DictConfig) -> None:
        jobs.append(job_of(composed, command, f"{command.config_name}_{len(jobs)}"))

    kept = [each for each in command.overrides if not each.lstrip("+").startswith(_LAUNCHING)]
    with TemporaryDirectory() as scratch:
        settings = [*quiet_settings(Path(scratch)), f"{LAUNCHER}={BASIC}"]
        _run(replace(command, overrides=kept), collect, settings)
    return jobs


_LAUNCHING = tuple(each for each in OF_SWEEPS if "sweeper" not in each)


def launch_jobs(
    command: Command, task: Callable[[DictConfig], Any], settings: Sequence[str]
) -> None:
    """Call the task for each run, where and when the command's sweeper and launcher say.

    Args:
        task: gets the composed config, in which HydraConfig is set; other processes may get a copy
            of it.
        settings: overrides of Hydra's own.
    """
    kept = [each for each in command.overrides if not each.startswith("hydra.sweep.")]
    _run(replace(command, overrides=kept), task, settings)


def _run(command: Command, task: Callable[[DictConfig], Any], settings: Sequence[str]) -> None:
    with told_plainly(command, parse_overrides(command)):
        run_hydra_main(command, task, settings)
