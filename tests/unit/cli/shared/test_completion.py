"""Shell completion: our commands, then what Hydra completes of a run's command line."""

from __future__ import annotations

import sys

import pytest

from torchprime.cli.main import main


def answer(argv: list[str]) -> None:
    try:
        code = main(argv)
    except SystemExit as stop:  # Hydra's flags leave so
        code = stop.code
    assert code in (0, None)


@pytest.fixture
def ask(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def asked(line: str) -> list[str]:
        monkeypatch.setenv("COMP_LINE", line)
        answer(["-sc", "query=bash"])
        said = capsys.readouterr()
        assert not said.err
        return said.out.split()

    return asked


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("torchprime train mesh=fsdp", ["mesh=fsdp2_tensor2", "mesh=fsdp4", "mesh=fsdp8"]),
        ("torchprime prepare --config-name quickstart task.optimizer.l",
         ["task.optimizer.learning_rate="]),
        ("torchprime train --backend native task.optimizer.l", ["task.optimizer.learning_rate="]),
        ("torchprime train --config-name ", []),
        ("torchprime train --back", []),
        ("torchprime chat --model ", []),
        ("torchprime verify outp", []),
    ],
)  # fmt: skip
def test_a_line_is_completed(ask, line: str, offered: list[str]) -> None:
    assert ask(line) == offered


def test_commands_are_offered_first(ask) -> None:
    assert {"train", "inspect", "resume-check"} <= set(ask("torchprime "))
    assert ask("torchprime tr") == ask("torchprime ")  # the shell takes those that fit


def test_the_script_asks_this_program(monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["/opt/bin/torchprime", "-sc", "install=bash"])
    answer(["--shell-completion", "install=bash"])
    assert capsys.readouterr().out.endswith("-F hydra_bash_completion torchprime\n")
