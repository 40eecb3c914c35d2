"""`torchprime plan` on the shipped model and rows: what it says, writes and refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from torchprime.cli.main import main
from torchprime.config.compose import compose_config

ARGV = ["plan", "--config-name", "quickstart", "eval=none", "task.sample_prompts=0"]


def test_the_written_config_composes_with_the_recommended_values(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "planned.yaml"
    assert main([*ARGV, "--device", "h100-80gb:2", "--json", "--out", str(out)]) == 0
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    changes = {each["key"]: each["value"] for each in found["changes"]}
    assert changes["ici_mesh.tensor"] == 1 and found["devices"]["count"] == 2
    assert "task.num_epochs" in changes and found["configured_fits"]
    assert f"--config-dir {tmp_path} --config-name planned" in printed.err
    config = compose_config(["--config-dir", str(tmp_path), "--config-name", "planned"])
    for key, value in changes.items():
        here: object = config
        for name in key.split("."):
            here = getattr(here, name)
        assert here == value, key
    assert config.device_count == 2
    for line in found["changes"]:
        assert f"# {line['key']}: {line['reason']}" in out.read_text()


def test_the_plan_is_printed_in_full(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(ARGV) == 0
    said = capsys.readouterr().out
    assert "parameters   1,189,280" in said
    assert "4,000 examples with 290,482 tokens; the longest has 103" in said
    assert "devices      not given" in said
    assert "148,208 supervised per pass" in said
    assert "task.num_epochs=3" in said and "Stanford Alpaca" in said


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--device", "h100"], "Did you mean h100-"),
        (["--device", "v6e-9"], "--device: given 'v6e-9', expected a GPU (a100-40gb, "),
        (["--device", "rtx-4090:many"], "rtx-4090:8 for eight of them"),
        (["--device", "v6e-8:2"], "--device: given 'v6e-8:2'"),
        (["--out", "plan.txt"], "a file that ends in .yaml"),
        (["--out", "nowhere/plan.yaml"], "a file in a folder"),
    ],
)
def test_wrong_arguments_are_one_message(
    argv: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*ARGV, *argv]) == 2
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error
