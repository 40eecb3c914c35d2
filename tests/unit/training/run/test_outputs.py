"""The outputs of a run, tried before its first step."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from torchprime.checkpoint.places import LocalPlace
from torchprime.checkpoint.room import Need
from torchprime.checkpoint.run.local_storage import LocalStorage
from torchprime.config.load import load_config
from torchprime.config.schema import TrainConfig
from torchprime.errors import ConfigError
from torchprime.training.optim.adamw import AdamW
from torchprime.training.run import outputs
from torchprime.training.run.export import Exporter
from torchprime.training.run.outputs import export_place, try_places
from torchprime.training.setup.inputs import RunInputs

VALUES = 10 * 4 + 4


def config_of(**given: Any) -> TrainConfig:
    task = {"name": "sft", "global_batch_size": 8, "max_steps": 10, **given.pop("task", {})}
    return load_config(
        {
            "dataset": {"file_dataset_path": "rows.jsonl"},
            "model": {"pretrained_model": "some/checkpoint"},
            "task": task,
            **given,
        }
    )


class Exports:
    """Records the calls; it needs 5 bytes."""

    def __init__(self) -> None:
        self.checked: list[object] = []

    def check(self, place: object) -> None:
        self.checked.append(place)

    def need(self, place: LocalPlace) -> Need:
        return Need("the export", place.local, 5, 1, "task.export_checkpoint_path")


@pytest.fixture
def needs(monkeypatch: pytest.MonkeyPatch) -> list[Need]:
    """Filled with the needs of the next trial."""
    found: list[Need] = []
    monkeypatch.setattr(outputs, "require_room", lambda given: found.extend(given))
    return found


def try_with(config: TrainConfig, folder: Path, place: Any = None) -> Exports:
    dtype = getattr(torch, config.torch_dtype)
    model = torch.nn.ModuleDict(
        {"embed_tokens": torch.nn.Embedding(10, 4), "norm": torch.nn.RMSNorm(4)}
    )
    inputs = SimpleNamespace(
        config=config,
        files=SimpleNamespace(num_parameters=VALUES),
        dtype=dtype,
        model=lambda: model.to(dtype),
    )
    exports = Exports()
    storage = LocalStorage(folder / "checkpoints")
    given = cast(RunInputs, inputs), folder, storage, AdamW(eps=1e-8, weight_decay=0.0)
    try_places(*given, cast(Exporter, exports), place)
    return exports


def test_a_relative_export_lies_in_the_runs_folder(tmp_path: Path) -> None:
    for wanted, place in (("export", tmp_path / "export"), ("/elsewhere/x", Path("/elsewhere/x"))):
        found = export_place(config_of(task={"export_checkpoint_path": wanted}), tmp_path, 1)
        assert isinstance(found, LocalPlace) and found.local == place
    assert export_place(config_of(task={"export_checkpoint_path": None}), tmp_path, 1) is None


def test_shards_of_several_hosts_are_refused(tmp_path: Path) -> None:
    config = config_of(task={"convert_to_safetensors": False, "export_checkpoint_path": "export"})
    assert export_place(config, tmp_path, 1) is not None
    with pytest.raises(ConfigError, match="task.convert_to_safetensors=false .* there are 2"):
        export_place(config, tmp_path, 2)


def test_a_run_without_outputs_needs_room_for_its_records(
    needs: list[Need], tmp_path: Path
) -> None:
    exports = try_with(config_of(), tmp_path)
    assert [need.what for need in needs] == ["records"] and not exports.checked
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize(
    ("dtype", "hf", "size"),
    [
        # Weights and both moments in fp32.
        ("float32", False, VALUES * (4 + 8)),
        ("float32", True, VALUES * (4 + 8 + 4)),
        # In bf16 with an fp32 master copy, and an export in bf16 beside it.
        ("bfloat16", False, VALUES * (2 + 4 + 8)),
        ("bfloat16", True, VALUES * (2 + 4 + 8 + 2)),
    ],
)
def test_a_checkpoint_needs_room_for_all_its_tensors(
    needs: list[Need], tmp_path: Path, dtype: str, hf: bool, size: int
) -> None:
    config = config_of(torch_dtype=dtype, checkpoint={"every_steps": 2, "hf": hf})
    try_with(config, tmp_path)
    (need,) = (need for need in needs if need.what == "a checkpoint")
    assert need.bytes == size and need.place == tmp_path / "checkpoints"


def test_the_exports_place_is_checked_and_probed(needs: list[Need], tmp_path: Path) -> None:
    probed: list[bool] = []

    class Place(LocalPlace):
        def probe(self) -> None:
            probed.append(True)

    config = config_of(task={"export_checkpoint_path": "export"})
    place = Place(tmp_path / "export")
    assert try_with(config, tmp_path, place).checked == [place] and probed == [True]
    assert needs[-1].what == "the export"
    assert try_with(replace(config, dry_run=True), tmp_path, place).checked and probed == [True]
    with pytest.raises(ConfigError, match=r"task.export_checkpoint_path: .* where this run"):
        try_with(config, tmp_path, Place(tmp_path / "checkpoints"))
