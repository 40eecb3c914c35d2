"""`torchprime resume-check RUN [key=value ...]`: what would differ if the run went on."""

from __future__ import annotations

import sys
from pathlib import Path

from torchprime.checkpoint.catalog import Catalog
from torchprime.checkpoint.manifest import Manifest, read_manifest
from torchprime.checkpoint.storage import Storage
from torchprime.cli.data import load
from torchprime.config.compose import compose_config
from torchprime.config.schema import TrainConfig
from torchprime.errors import CheckpointError, ConfigError, UserError
from torchprime.training.changes import REFUSED, find_changes, not_allowed
from torchprime.training.resuming import checkpoints_place
from torchprime.training.run_folder import CONFIG

USAGE = "usage: torchprime resume-check RUN [key=value ...]"


def resume_check_main(argv: list[str]) -> int:
    """Print each difference; 0 if the run could go on, 1 if not, 2 for a mistake."""
    if not argv or argv[0] in ("-h", "--help") or "=" in argv[0]:
        print(USAGE, file=sys.stderr)
        return 0 if argv and argv[0] in ("-h", "--help") else 2
    try:
        return _check(Path(argv[0]), argv[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


def _check(run: Path, overrides: list[str]) -> int:
    if not (run / CONFIG).is_file():
        raise ConfigError(
            f"{run} holds no {CONFIG}. Give a run's folder, <output_dir>/<run_name>. {USAGE}"
        )
    config = compose_config(
        ["--config-dir", str(run.absolute()), "--config-name", Path(CONFIG).stem, *overrides]
    )
    manifest, where = _newest(run, config)
    now = load(config)  # the data is prepared, or found prepared
    identity = {"model": now.files.fingerprint(), **now.data.fingerprints()}
    changes = find_changes(manifest, config.to_dict(), identity)
    print(f"{where}: step {manifest.step}, written by {manifest.backend} on {manifest.mesh}")
    for change in changes:
        print(f"  {change.describe()}")
    refused = [change for change in changes if change.kind == REFUSED]
    asked = not_allowed(changes, config.resume.allow_changes)
    if not refused and not asked:
        print("the run would go on from there")
        return 0
    count = len(refused) + len(asked)
    print(f"the run would not go on from there: {count} of {len(changes)} changes forbid it")
    if asked:
        keys = ",".join(change.key for change in asked)
        print(f"to allow what is questionable: resume.allow_changes=[{keys}]")
    return 1


def _newest(run: Path, config: TrainConfig) -> tuple[Manifest, str]:
    storage = Storage.of(checkpoints_place(run, config.checkpoint.folder))
    steps = Catalog(storage).steps()
    if not steps:
        raise CheckpointError(f"{storage.describe()} holds no checkpoint.")
    name = Catalog.name_of(steps[-1])
    return read_manifest(storage, name), storage.describe(name)
