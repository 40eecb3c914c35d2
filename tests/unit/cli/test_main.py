"""The command line around a run: which commands there are, and what a wrong one gets."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import torchprime.cli
from torchprime.cli.main import CONFIG_COMMANDS, OTHER_COMMANDS, main

COMMANDS = sorted([*CONFIG_COMMANDS, *OTHER_COMMANDS])
GROUPS = {
    "before a run": ["doctor", "plan", "lr-range", "inspect", "prepare", "fisher"],
    "run": ["train", "watch"],
    "after a run": [
        "compare",
        "report",
        "sweep",
        "chat",
        "verify",
        "export",
        "average",
        "evaluate",
        "sample",
        "lm-eval",
        "resume-check",
    ],
}


def test_help_groups_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    said = capsys.readouterr().out
    assert main([]) == 0 and capsys.readouterr().out == said
    shown = {}
    for part in said.split("\n\n")[1:]:
        title, body = part.split(":\n", 1)
        shown[title] = re.findall(r"^  ([a-z-]+) .+\n      [A-Z].+\.$", body, re.MULTILINE)
    assert shown == GROUPS
    assert sorted(sum(shown.values(), [])) == COMMANDS


def test_each_commands_module_is_named_as_it_is_typed() -> None:
    folder = Path(torchprime.cli.__file__).parent
    files = [
        path
        for room in (".", "before", "weights", "answers", "sweeps")
        for path in (folder / room).glob("*.py")
    ]
    modules = {path.stem for path in files} - {"__init__", "main"}
    named = {name.replace("-", "_") for name in COMMANDS}
    # `inspect` is a module of the standard library.
    assert modules == named - {"inspect"} | {"inspect_data"}


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
