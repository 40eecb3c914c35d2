"""The outputs of a run, tested before its first step: room on disks, rights, names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torchprime.checkpoint.hf.card import CardFacts
from torchprime.checkpoint.hf.source import hub_name
from torchprime.checkpoint.hf.write import WeightLayout
from torchprime.checkpoint.places import ExportPlace, LocalPlace
from torchprime.checkpoint.room import Need, require_room
from torchprime.checkpoint.run.local_storage import LocalStorage
from torchprime.checkpoint.run.storage import Storage
from torchprime.config.paths import is_url
from torchprime.config.schema import TrainConfig
from torchprime.errors import ConfigError
from torchprime.training.optim.optimizer import Optimizer
from torchprime.training.run import folder as run_folder
from torchprime.training.run import resume as resuming
from torchprime.training.run.export import BASE, Exporter
from torchprime.training.setup.inputs import RunInputs
from torchprime.training.setup.plan import checkpoint_bytes, stored_parameters


def make_exporter(inputs: RunInputs, say: Callable[[str], None]) -> Exporter:
    """Return the writer of the run's exports, which checkpoints need too."""
    c, files, rows = inputs.config, inputs.files, inputs.rows
    return Exporter(
        files,
        layout=WeightLayout(files.shapes, inputs.dtype, int(c.task.max_shard_size_gb * 1e9)),
        card=CardFacts(
            name=c.run_name,
            base_model=c.model.pretrained_model,
            wrapper=files.wrapper,
            dataset=rows.report.source,
            hub_model=hub_name(c.model.pretrained_model),
            hub_datasets=tuple(rows.sources.hub_names()),
            command=run_folder.command(),
            parameters=files.num_parameters,
            versions=run_folder.versions(),
        ),
        # Only a template used in training replaces the tokenizer's own one.
        template=inputs.template if rows.report.has_chats else None,
        stop_ids=inputs.stop_ids,
        fingerprints={
            **rows.fingerprints(),
            **({} if inputs.base is None else {BASE: inputs.base}),
            "config": run_folder.config_fingerprint(c.to_dict()),
        },
        say=say,
    )


def export_place(config: TrainConfig, folder: Path, process_count: int) -> ExportPlace | None:
    """Return the place of the export at the run's end; None if the config asks for none.

    Raises:
        ConfigError: several hosts would have to write shards.
    """
    if not config.task.convert_to_safetensors and process_count > 1:
        raise ConfigError(
            "task.convert_to_safetensors=false writes from one host only for now; there are "
            f"{process_count}. Set it to true."
        )
    wanted = config.task.export_checkpoint_path
    if wanted is None:
        return None
    # A relative path is inside the run's folder; an absolute one or one with `..` is used as it is.
    place = wanted if is_url(wanted) else folder / wanted
    return ExportPlace.of(place, folder / run_folder.TO_SEND)


def try_places(
    inputs: RunInputs,
    folder: Path,
    storage: Storage,
    optimizer: Optimizer,
    exporter: Exporter,
    place: ExportPlace | None,
) -> None:
    """Check now that records, checkpoints and the export can be written. Only the first process
    does: it alone writes an export, and hosts may have disks of their own.

    Args:
        storage: of the checkpoints.
        place: of the export; None if there is none to write.
    """
    c = inputs.config
    needs = [Need("records", folder, 1_000_000, len(run_folder.OWN_NAMES), "output_dir")]
    if c.saves:
        if not c.dry_run:
            resuming.check_writable(storage)
        if isinstance(storage, LocalStorage):
            needs.append(_checkpoint_need(inputs, storage.root, optimizer))
    if place is not None:
        if isinstance(place, LocalPlace):
            run_folder.check_export_folder(folder, place.local)
        exporter.check(place)
        if not c.dry_run:
            place.probe()
        needs.append(exporter.need(place))
    require_room(needs)


def _checkpoint_need(inputs: RunInputs, root: Path, optimizer: Optimizer) -> Need:
    """Return the disk space that one checkpoint needs, beside the existing ones."""
    size = checkpoint_bytes(inputs.config, stored_parameters(inputs.model()), optimizer)
    if inputs.config.checkpoint.hf:
        size += inputs.files.num_parameters * inputs.dtype.itemsize
    return Need("a checkpoint", root, size, 40, "checkpoint.folder")
