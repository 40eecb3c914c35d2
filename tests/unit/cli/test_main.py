"""The command line around a run: which commands there are, and what a wrong one gets."""

from __future__ import annotations

import pytest

from torchprime.cli.main import main

COMMANDS = ("prepare", "inspect", "compare", "export", "verify")


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == main([]) == 0
    said = capsys.readouterr().out
    assert all(f"  {name} " in said for name in COMMANDS)


def test_a_misspelt_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inpsect"]) == 2
    said = capsys.readouterr().err
    assert "no command 'inpsect'. Did you mean inspect?" in said and "Traceback" not in said


def test_prepare_prints_the_budget(capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(["prepare", "--config-name", "quickstart", "eval=none", "task.sample_prompts=0"]) == 0
    )
    captured = capsys.readouterr()
    assert "1,151 blocks of 256, 72 steps per epoch at 16 blocks per update" in captured.out
    assert "prepared in" in captured.err
    assert (
        main(["prepare", "--config-name", "quickstart", "eval=none", "task.sample_prompts=0"]) == 0
    )
    assert "found prepared in" in capsys.readouterr().err


def test_a_wrong_override_is_one_message(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prepare", "--config-name", "quickstart", "dataset.pakcing=none"]) == 2
    said = capsys.readouterr().err
    assert "dataset.packing" in said and "Traceback" not in said
