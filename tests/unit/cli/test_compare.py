"""The command line of `torchprime compare`: names, options, files, exit codes, advice."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from torchprime.cli.compare import compare_main, name_runs
from torchprime.errors import ConfigError


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """A run's folder in the current one; `factor` multiplies the loss of step 5."""
    monkeypatch.chdir(tmp_path)

    def make(name: str, factor: float = 1.0, dtype: str = "float32", prefix: str = "h") -> str:
        folder = tmp_path / name
        folder.mkdir(parents=True)
        with (folder / "metrics.jsonl").open("w") as file:
            for step in range(1, 11):
                loss = 4.0 / step * (factor if step == 5 else 1)
                record = {"kind": "train", "step": step, "loss": loss, "grad_norm": 2.0, "lr": 1e-3}
                record |= {"batch_hash": f"{prefix}{step}", "supervised_tokens": 100 + step}
                file.write(json.dumps(record) + "\n")
        (folder / "run.json").write_text(json.dumps({"model": {"dtype": dtype}}))
        return name

    return make


def test_agreement_is_exit_0_with_three_files(run, tmp_path: Path, capsys) -> None:
    assert compare_main([run("a"), run("b")]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[-1] == "AGREE: b with a over 10 steps"
    assert "wrote parity.json, parity.png, parity.svg" in said
    assert json.loads((tmp_path / "parity.json").read_text())["verdict"] == "agree"
    assert (tmp_path / "parity.svg").exists()


def test_a_difference_is_exit_1_and_says_where(run, capsys) -> None:
    arguments = [run("a"), run("b", 1.0002), run("c"), "--out", "sub/dir", "--figure", "fig.png"]
    assert compare_main(arguments) == 1
    said = capsys.readouterr().out
    assert "b: first out of its band at step 5: loss 0.80016, a has 0.8; 2.0e-04 apart" in said
    assert said.splitlines()[-1] == "DIFFER: b from a"
    assert sorted(p.name for p in Path("sub/dir").iterdir()) == [
        "fig.png",
        "fig.svg",
        "parity.json",
    ]


def test_other_data_stop_it_before_a_figure(run, capsys) -> None:
    assert compare_main([run("a"), run("b")]) == 0
    assert compare_main(["a", run("c", 1.5, prefix="x")]) == 1
    said = capsys.readouterr().out
    assert "DIFFERENT at step 1: batch_hash x1; a has h1" in said and "first out of" not in said
    assert "parity.png is from an earlier comparison" in said
    assert said.splitlines()[-1].startswith("DIFFERENT DATA: c did not see the batches of a")


def test_the_noise_floor_from_measuring_to_judging(run, tmp_path: Path, capsys) -> None:
    runs = [run(name, factor, "bfloat16") for name, factor in [("a", 1), ("b", 1.01), ("c", 1.02)]]
    judged = ["a", "c", "--figure", "none"]
    assert compare_main(judged) == 1
    said = capsys.readouterr().out.splitlines()
    assert said[-1].startswith("NOT JUDGED")
    assert said[-2] == "  torchprime compare a c --figure none --noise-floor noise_floor.json"
    assert compare_main(["--measure-noise", *runs[:2], "--out", "floor.json"]) == 0
    assert "spread at most 1.0e-02" in capsys.readouterr().out
    assert compare_main([*judged, "--noise-floor", "floor.json"]) == 0
    told = json.loads((tmp_path / "parity.json").read_text())["tolerances"]["loss"]
    assert "a, b: 3 times" in told["from"]
    assert (
        compare_main(["a", run("d", 1.031, "bfloat16"), *judged[2:], "--noise-floor", "floor.json"])
        == 1
    )
    assert not (tmp_path / "parity.png").exists()


def test_measuring_writes_into_a_folder_or_here(run, tmp_path: Path) -> None:
    runs = [run("a", dtype="bfloat16"), run("b", 1.01, "bfloat16")]
    (tmp_path / "there").mkdir()
    assert compare_main(["--measure-noise", *runs, "--out", "there"]) == 0
    assert compare_main(["--measure-noise", *runs]) == 0
    assert Path("there/noise_floor.json").read_bytes() == Path("noise_floor.json").read_bytes()


def test_options_reach_the_verdict(run) -> None:
    runs = [run("a"), run("b", 1.01), "--figure", "none"]
    assert compare_main(runs) == 1
    assert compare_main([*runs, "--steps", "4"]) == 0
    assert compare_main([*runs, "--loss-tolerance", "0.011"]) == 0


def test_few_steps_in_common_are_no_agreement(run, tmp_path: Path, capsys) -> None:
    run("a")
    lines = (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "metrics.jsonl").write_text(lines[0] + "\n")
    assert compare_main(["a", "b", "--figure", "few"]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == (
        "TOO FEW STEPS: the losses of b and a were compared at 1 of 10 steps, which lie in 1 of "
        "the 10 equal parts of the run; an agreement needs 3. Log the same steps in both, or "
        "judge the common ones alone: --steps 1"
    )
    told = json.loads((tmp_path / "parity.json").read_text())
    assert told["verdict"] == "too few steps" and (tmp_path / "few.svg").exists()
    assert compare_main(["a", "b", "--figure", "none", "--steps", "1"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "AGREE: b with a over 1 step"
    (tmp_path / "b" / "metrics.jsonl").write_text("\n".join(lines[:5]) + "\n")
    assert compare_main(["a", "b", "--figure", "none"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "AGREE: b with a over 5 of 10 steps"


def test_a_line_that_cannot_be_read_is_exit_2_and_names_it(run, tmp_path: Path, capsys) -> None:
    (tmp_path / "b.log").write_text("step 1 loss 2.5\nstep 2 loss 2,5000\n")
    assert compare_main([run("a"), "b.log", "--figure", "none"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: run b.log, line 2: 'step 2 loss 2,5000': '2,5000' is ambi")
    assert said.count("\n") == 1 and not (tmp_path / "parity.json").exists()


def test_means_and_resumes_that_a_log_does_not_tell(run, tmp_path: Path, capsys) -> None:
    losses = {s: sum(4.0 / each for each in range(s - 1, s + 1)) / 2 for s in (2, 4, 6, 8, 10)}
    (tmp_path / "b.log").write_text("".join(f"step {s} loss {x!r}\n" for s, x in losses.items()))
    compared = [run("a"), "b.log", "--figure", "none"]
    assert compare_main(compared) == 2
    assert "--mean-over b=1 or --mean-over b=2" in capsys.readouterr().err
    assert compare_main([*compared, "--mean-over", "b=1"]) == 1
    assert compare_main([*compared, "--mean-over", "b=2"]) == 0
    state = [{"step": s, "loss": x if s != 6 else 4.0 / 6} for s, x in losses.items()]
    (tmp_path / "hf.json").write_text(json.dumps({"log_history": state}))
    assert compare_main(["a", "hf.json", "--figure", "none"]) == 1
    assert "--resumed-at hf=5" in capsys.readouterr().out
    assert compare_main(["a", "hf.json", "--figure", "none", "--resumed-at", "hf=5"]) == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["a", "a", "--mean-over", "b=2"], "--mean-over: given 'b=2', expected NAME=N"),
        (["a", "a", "--mean-over", "a=0"], "--mean-over: given 'a=0', expected NAME=N"),
        (["a", "a", "--resumed-at", "25"], "--resumed-at: given '25', expected NAME=N"),
        (["a", "x=a", "--mean-over", "a=2"], "--mean-over: given for a, but each loss in its"),
        (["a", "x=a", "--resumed-at", "a=2"], "--resumed-at: given for a, but each loss in its"),
        (["a"], "two or more"),
        (["a", "nothing"], "nothing"),
        (["a", "a", "--steps", "0"], "--steps"),
        (["a", "a", "--loss-tolerance", "-1"], "--loss-tolerance"),
        (["a", "a", "--noise-floor", "nothing.json"], "--noise-floor"),
        (["x=a", "x=a"], "given twice"),
        (["a", "a", "--out", "a/run.json"], "--out"),
        (["--measure-noise", "a", "a"], "equal to the last bit"),
        (["a", "a", "--steps", "many"], "invalid int value"),
        (["a", "a", "--colour"], "--colour"),
        ([], "RUN"),
    ],
)
def test_a_mistake_is_exit_2_and_one_message(run, arguments: list[str], said: str, capsys) -> None:
    run("a")
    assert compare_main(arguments) == 2
    captured = capsys.readouterr()
    assert said in captured.err and "Traceback" not in captured.err and not captured.out


def test_help_tells_the_formats_and_is_no_mistake(capsys) -> None:
    assert compare_main(["--help"]) == 0
    said = capsys.readouterr().out
    assert "trainer_state.json" in said and "--measure-noise" in said


def test_names_of_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("x/run", "y/run", "lr=3"):
        Path(folder).mkdir(parents=True)
    labels = [label for label, _ in name_runs(["x/run", "y/other.v2.log", "x/a/metrics.jsonl"])]
    assert labels == ["run", "other.v2", "a"]
    assert name_runs(["gpu=x/run", "a/b=c", "lr=3"]) == [
        ("gpu", "x/run"), ("b=c", "a/b=c"), ("lr=3", "lr=3"),
    ]  # fmt: skip
    assert [label for label, _ in name_runs(["x/run", "y/run"])] == ["x/run", "y/run"]
    assert [label for label, _ in name_runs(["x/run", "x/run", "run=z"])] == [
        "x/run",
        "x/run#2",
        "run",
    ]
    with pytest.raises(ConfigError):
        name_runs(["a=x", "a=y"])


def test_a_reader_that_stops_early_and_one_without_unicode(run, repo_dir: Path) -> None:
    runs = [run("a"), f"größe={run('b')}", "--figure", "none"]
    script = repo_dir / "experimental" / "torchrun_gpu_sft" / "draw_figure.py"
    command = [sys.executable, str(script), *runs]
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    done = subprocess.run(command, capture_output=True, env=environment, check=True)
    assert rb"gr\xf6\xdfe" in done.stdout
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert done.returncode == 0 and done.stderr == b""


def test_neither_torch_nor_matplotlib_is_imported_without_need(run) -> None:
    arguments = [run("a"), run("b"), "--figure", "none"]
    code = (
        "import sys\nfrom torchprime.cli.compare import compare_main\n"
        f"assert compare_main({arguments!r}) == 0\n"
        "print([m for m in ('torch', 'matplotlib', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
