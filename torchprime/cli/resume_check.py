"""`torchprime resume-check RUN [...]`: report what a run would do when it is started again.

Without --config-name, the run's own config.yaml is the base, and group options (mesh=fsdp8) are
applied to it. With --config-name the command is composed as training composes it. Two settings hold
for one start only and have to be in the command again: the start of the run (resume.source) and the
allowed changes (resume.allow_changes).
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import yaml

from torchprime.checkpoint.places import ExportPlace
from torchprime.checkpoint.run.catalog import Catalog
from torchprime.checkpoint.run.open_storage import open_storage
from torchprime.cli.shared.arguments import make_parser, run_command
from torchprime.cli.shared.data import load
from torchprime.config.compose import SCHEMA_NODE, compose_config, is_group
from torchprime.config.paths import is_url, local_path
from torchprime.config.schema import TrainConfig
from torchprime.errors import ConfigError
from torchprime.files.atomic import write_text
from torchprime.text.terminal import print_lines, say
from torchprime.training.evaluating import make_choosing
from torchprime.training.run import resume as resuming
from torchprime.training.run.changes import REFUSED, find_changes, not_allowed
from torchprime.training.run.folder import CONFIG, read_config
from torchprime.training.run.resume import Past, ResumePoint
from torchprime.training.setup.plan import plan_steps

EPILOG = """\
RUN is a run's folder. Give the flags and overrides of the next start. Without --config-name
the run's config.yaml is the base. Exit code: 0 if the run would resume or is complete, 1 if
not, 2 for a user error.
"""
# Sections that a group's option sets completely: keys absent from its file get the defaults.
WHOLE = {
    "mesh": ("ici_mesh", "dcn_mesh"),
    "remat": ("remat",),
    "task": ("task",),
    "eval": ("eval",),
}
# Another source of rows replaces the previous one.
SOURCES = ("hf_dataset_name", "hf_dataset_config_name", "file_dataset_path", "mixture")


def resume_check_main(argv: list[str]) -> int:
    """Print the result; return 0 if the run could resume, 1 if not, 2 for a user error."""
    parser = make_parser(
        "torchprime resume-check", "Report what a run would do when started again.", EPILOG
    )
    parser.add_argument("run", metavar="RUN")
    parser.add_argument("--config-name", "-cn", metavar="NAME", help="as in training")
    parser.add_argument("--config-dir", "-cd", metavar="FOLDER", help="as in training")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    return run_command(parser, argv, _check)


def _check(given: argparse.Namespace) -> int:
    run = local_path("RUN", given.run)
    if not (run / CONFIG).is_file():
        raise ConfigError(
            f"RUN: {run} holds no {CONFIG}, expected a run's folder, <output_dir>/<run_name>."
        )
    config = _config(run, given.config_name, given.config_dir, given.overrides)
    catalog = Catalog(open_storage(resuming.checkpoints_place(run, config.checkpoint.folder)))
    resuming.may_go_on(config.resume.source, run, catalog)
    point = resuming.find_point(config.resume.source, catalog, _say)
    if point is None:
        _say("the run wrote no checkpoint: it would start again at the first step")
        return 0
    manifest = point.reader.manifest
    now = load(config)  # prepares the data, or finds it in the cache
    base = None if now.files.adapter is None else now.files.base_fingerprint()
    identity = {"model": now.files.fingerprint(), "base": base, **now.data.fingerprints()}
    older = {"model": now.files.older_fingerprint()}
    changes = find_changes(manifest, config.to_dict(), identity, older)
    _say(f"{point.where}: step {manifest.step}, written by {manifest.backend} on {manifest.mesh}")
    for change in changes:
        _say(f"  {change.describe()}")
    refused = [change for change in changes if change.kind == REFUSED]
    asked = not_allowed(changes, config.resume.allow_changes)
    if not refused and not asked:
        _say(_what_is_left(config, run, point, plan_steps(config, now.data.train).total_steps))
        return 0
    count = len(refused) + len(asked)
    _say(f"the run would not resume from there: {count} of {len(changes)} changes forbid it")
    if asked:
        keys = ",".join(change.key for change in asked)
        _say(f"to allow these changes: resume.allow_changes=[{keys}]")
    return 1


def _say(line: str) -> None:
    print_lines([line])


def _what_is_left(config: TrainConfig, run: Path, point: ResumePoint, total: int) -> str:
    """Describe the work that remains after a point from which the run can resume."""
    stopping = make_choosing(config).stopping
    if point.step < total and not Past.of(point.reader.manifest).stopped_early(stopping):
        return f"the run would resume from there, to step {total}"
    if (wanted := config.task.export_checkpoint_path) is None:
        return "the run is complete: nothing would be done"
    place = ExportPlace.of(wanted if is_url(wanted) else run / wanted)
    if place.is_there():
        return "the run is complete: nothing would be done"
    return f"all steps are done: only the export to {place} would be written"


# The config of the next start ---------------------------------------------------------------------


def _config(run: Path, name: str | None, folder: str | None, overrides: list[str]) -> TrainConfig:
    if name is not None:
        place = [] if folder is None else ["--config-dir", folder]
        return compose_config(["--config-name", name, *place, *overrides])
    base: dict[str, Any] = read_config(run)
    allowed = base.get("resume", {}).get("allow_changes")
    if allowed and not any(each.startswith("resume.allow_changes") for each in overrides):
        say(
            f"note: the last start had resume.allow_changes={allowed}. It counts only if the "
            "next start sets it again, so it is not counted here."
        )
    base["resume"] = {}
    options = [each for each in overrides if is_group(each.partition("=")[0], folder)]
    for option in options:
        group = option.partition("=")[0]
        for name_of_section in WHOLE.get(group, ()):
            base.pop(name_of_section, None)
        section = base.get(group, {})
        section.update({key: None for key in SOURCES[:-1] if key in section})
        section.update({key: [] for key in SOURCES[-1:] if key in section})
    laid_over = [f"+{each}" if each in options else each for each in overrides]
    with tempfile.TemporaryDirectory() as temporary:
        defaults = {"defaults": [SCHEMA_NODE, "_self_"]}  # for keys that are newer than the run
        text = yaml.safe_dump(defaults | _escaped(base), sort_keys=False)
        write_text(Path(temporary) / CONFIG, text)
        if folder is not None:
            for group in local_path("--config-dir", folder).resolve().iterdir():
                if group.is_dir():
                    (Path(temporary) / group.name).symlink_to(group)
        argv = ["--config-dir", temporary, "--config-name", Path(CONFIG).stem, *laid_over]
        return compose_config(argv)


def _escaped(value: Any) -> Any:
    """Escape interpolations: in resolved values a remaining `${` is plain text."""
    if isinstance(value, dict):
        return {key: _escaped(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_escaped(item) for item in value]
    return value.replace("${", "\\${") if isinstance(value, str) else value
