"""`torchprime compare` on run folders made by hand: what flips the verdict, and what it says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from torchprime.cli.main import main

STEPS = 60
Change = Callable[[list[dict[str, Any]]], None]


def records() -> list[dict[str, Any]]:
    return [
        {
            "kind": "train",
            "step": step,
            "epoch": step / 10,
            "loss": 5.0 / step,
            "grad_norm": 1.0 + step / 100,
            "lr": 1e-3 * (1 - step / 100),
            "supervised_tokens": 900 + step,
            "real_tokens": 1000,
            "slot_tokens": 1024,
            "batch_hash": f"{step:016x}",
            "step_seconds": 0.5,
            "supervised_tokens_per_s": 1800.0,
            "slot_tokens_per_s": 2048.0,
        }
        for step in range(1, STEPS + 1)
    ]


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., str]:
    """A run folder; `change` alters its records."""

    def write(name: str, change: Change = lambda lines: None, dtype: str = "float32") -> str:
        folder = tmp_path / name
        folder.mkdir()
        lines = records()
        change(lines)
        (folder / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
        facts = {"backend": name, "model": {"dtype": dtype}, "mesh": {"fsdp": 1}}
        (folder / "run.json").write_text(json.dumps(facts))
        return str(folder)

    return write


def at(step: int, field: str, factor: float) -> Change:
    def change(lines: list[dict[str, Any]]) -> None:
        lines[step - 1][field] *= factor

    return change


@pytest.fixture
def judge(make, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """(exit code, what was printed, parity.json) of a changed run against an unchanged one."""

    def run(change: Change = lambda lines: None, **options: str) -> tuple[int, str, dict]:
        runs = [make("one", **options), make("two", change, **options)]
        code = main(["compare", *runs, "--out", str(tmp_path), "--figure", "none"])
        captured = capsys.readouterr()
        path = tmp_path / "parity.json"
        found = json.loads(path.read_text()) if path.exists() else {}
        return code, captured.out + captured.err, found

    return run


def test_equal_runs_agree(judge) -> None:
    code, said, found = judge()
    assert code == 0 and found["verdict"] == "agree"
    assert "the same batches at 60 of 60 steps" in said and "AGREE" in said


@pytest.mark.parametrize(
    ("field", "within", "beyond"),
    [("loss", 0.9e-4, 1.2e-4), ("grad_norm", 0.9e-3, 1.2e-3), ("lr", 0.5e-6, 2e-6)],
)
def test_the_bands_hold_where_they_should(
    judge, make, tmp_path: Path, field: str, within: float, beyond: float
) -> None:
    code, _, found = judge(at(57, field, 1 + within))
    assert code == 0
    worst = found["pairs"][0]["quantities"][field]["worst"]
    assert worst["step"] == 57 and worst["relative"] == pytest.approx(within, rel=1e-3)
    changed = make("three", at(57, field, 1 + beyond))
    assert main(["compare", str(tmp_path / "one"), changed, "--out", str(tmp_path)]) == 1
    found = json.loads((tmp_path / "parity.json").read_text())
    first = found["pairs"][0]["first_beyond"]
    assert found["verdict"] != "agree" and first["step"] == 57


def test_another_batch_is_said_before_anything_is_judged(judge) -> None:
    def change(lines: list[dict[str, Any]]) -> None:
        lines[11]["batch_hash"] = "f" * 16
        lines[40]["loss"] *= 2

    code, said, found = judge(change)
    assert code == 1 and found["verdict"] == "different data"
    assert "step 12" in said and "f" * 16 in said and f"{12:016x}" in said


def test_other_token_counts_are_other_data(judge) -> None:
    code, said, found = judge(at(30, "supervised_tokens", 2))
    assert code == 1 and found["verdict"] == "different data" and "step 30" in said


def test_bf16_is_not_judged_without_a_noise_floor(judge) -> None:
    code, said, found = judge(at(5, "loss", 1 + 1e-3), dtype="bfloat16")
    assert code == 1 and found["verdict"] not in ("agree", "differ")
    assert "--measure-noise" in said


def test_only_common_steps_are_judged(judge) -> None:
    code, said, found = judge(lambda lines: lines.__delitem__(slice(20, None)))
    assert code == 0 and found["steps"]["common"] == 20


def test_hf_trainer_states_are_read(make, tmp_path: Path, capsys) -> None:
    history = [
        {"step": r["step"], "loss": r["loss"], "grad_norm": r["grad_norm"],
         "learning_rate": r["lr"], "epoch": r["epoch"]} for r in records()
    ]  # fmt: skip
    state = tmp_path / "trainer_state.json"
    state.write_text(json.dumps({"global_step": STEPS, "log_history": history}))
    code = main(["compare", make("one"), f"theirs={state}", "--out", str(tmp_path)])
    said = capsys.readouterr().out
    assert "theirs" in said and code in (0, 1)
    assert "60 steps" in said


def test_the_figure_is_drawn_and_does_not_change(make, tmp_path: Path) -> None:
    runs = [make("one"), make("two", at(9, "loss", 1 + 1e-5))]
    drawn = []
    for place in ("first", "second"):
        assert main(["compare", *runs, "--out", str(tmp_path / place)]) == 0
        drawn.append((tmp_path / place / "parity.svg").read_bytes())
        assert (tmp_path / place / "parity.png").stat().st_size > 10_000
    assert drawn[0] == drawn[1]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["nowhere", "nowhere"], "nowhere"), (["one"], "two"), ([], "RUN")],
)
def test_what_cannot_be_compared(arguments: list[str], said: str, make, tmp_path, capsys) -> None:
    folder = make("one")
    given = [folder if each == "one" else each for each in arguments]
    assert main(["compare", *given, "--out", str(tmp_path)]) == 2
    message = capsys.readouterr().err
    assert said in message and "Traceback" not in message
