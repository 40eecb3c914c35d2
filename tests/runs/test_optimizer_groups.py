"""Whole runs with groups of parameters: frozen weights in exports and checkpoints, on both
backends."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from torchprime.config.compose import compose_config
from torchprime.config.entry import run_main
from torchprime.torch_native.train import main as native

FROZEN = ("model.embed_tokens.", "model.layers.0.mlp.")
GROUPS = (
    "task.optimizer.groups=[{pattern: model.embed_tokens, frozen: true}, "
    "{pattern: model.layers.0.mlp, frozen: true}, {pattern: model.layers.*.self_attn, "
    "lr_factor: 0.5}]"
)


def test_frozen_weights_are_the_bases_in_checkpoints_and_export(
    cut_short: Callable, capsys: Any
) -> None:
    """On XLA until a kill, then on one process of the native backend."""
    folder, argv = cut_short(3, GROUPS)
    assert run_main(native, [*argv, "ici_mesh.fsdp=1", "ici_mesh.tensor=1"]) == 0
    assert "step_00000003" in capsys.readouterr().err
    base = load_file(Path(compose_config(argv).model.pretrained_model or "") / "model.safetensors")
    export = load_file(folder / "export" / "model.safetensors")
    assert export.keys() == base.keys()
    for name, weight in base.items():
        assert torch.equal(export[name], weight) == name.startswith(FROZEN), name


@pytest.mark.parametrize(
    ("groups", "said"),
    [
        ("[{pattern: model.layer.*.mlp}]", "groups[0].pattern: given 'model.layer.*.mlp'"),
        (
            "[{pattern: model, frozen: true}, {pattern: lm_head, frozen: true}]",
            "groups that freeze all 21 parameters",
        ),
    ],
)
def test_groups_without_effect_are_one_message(
    groups: str, said: str, run: Callable, command: Callable, capsys: Any, tmp_path: Path
) -> None:
    argv = command(f"task.optimizer.groups={groups}", f"output_dir={tmp_path}", "dry_run=true")
    assert run(argv) == 2
    assert said in capsys.readouterr().err


def test_layers_of_a_scan_are_frozen_together(
    run: Callable, command: Callable, capsys: Any, tmp_path: Path
) -> None:
    argv = command(GROUPS, f"output_dir={tmp_path}", "dry_run=true", "remat.scan_layers=true")
    assert run(argv) == 2
    printed = capsys.readouterr().err
    assert "remat.scan_layers: given true, expected false, since mlp.gate_proj.weight" in printed
