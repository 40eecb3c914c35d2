"""-m for real: a sweep that is killed and goes on, its table, and runs that share a compile."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from torchprime.cli.main import main as torchprime
from torchprime.config.compose import compose_config

SMALL = (
    "task.max_steps=4", "eval.every_steps=2", "eval.generate.max_examples=4", "logging_steps=1",
    "task.sample_prompts=0", "dataset.block_size=64", "dataset.max_rejected_fraction=1.0",
    "task.global_batch_size=4", "isolation_probe=false", "task.export_checkpoint_path=null",
    "task.lr_scheduler.warmup_steps=1", "selection.gates=[]", "export.which=last",
    "selection.ranking=[answer_accuracy desc, eval_loss asc]",
)  # fmt: skip
INHERITED = ("WORLD_SIZE", "CPU_NUM_DEVICES", "PJRT_NPROC")
SIZES = ("64", "72")


def start(out: Path, *argv: str, backend: str = "native") -> subprocess.Popen:
    """The sweep as a user starts it."""
    command = [sys.executable, "-m", "torchprime.cli.main", "train", "--backend", backend, "-m"]
    given = {each.partition("=")[0] for each in argv}
    small = [each for each in SMALL if each.partition("=")[0] not in given]
    return subprocess.Popen(
        [*command, "-cn", "quickstart", *small, "mesh=single", f"output_dir={out}", *argv],
        env={key: value for key, value in os.environ.items() if key not in INHERITED},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def starts(run: Path) -> int:
    return len(json.loads((run / "run.json").read_text())["starts"])


def records(run: Path, kind: str) -> list[dict[str, Any]]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A sweep of three block sizes, into the last of which no row fits. Its process is killed in
    the second run; then the same command goes on."""
    out = tmp_path_factory.mktemp("sweep")
    given = (
        f"dataset.block_size={','.join(SIZES)},48",
        "checkpoint.every_steps=1",
        "run_name=mine",
    )
    good = [out / "mine" / f"block_size={size}" for size in SIZES]
    first = start(out, *given)
    while not any((good[1] / "checkpoints").glob("step_*")):
        assert first.poll() is None, first.communicate()[1]
        time.sleep(0.02)
    os.kill(first.pid, signal.SIGKILL)
    first.communicate()  # the run ends by itself: its sweep is gone
    left = json.loads((good[1] / "run.json").read_text())
    again = start(out, *given)
    _, said = again.communicate()
    table = json.loads((out / "mine" / "sweep.json").read_text())
    return SimpleNamespace(
        folder=out / "mine", good=good, left=left, code=again.returncode, said=said, table=table,
        rows={row["run"]: row for row in table["rows"]},
    )  # fmt: skip


def test_a_killed_sweep_goes_on_where_it_stopped(swept: SimpleNamespace) -> None:
    finished, resumed = swept.good
    assert f"{finished.name}: finished before" in swept.said
    assert starts(finished) == 1 and "goodput" not in swept.left
    assert starts(resumed) == 2
    for run in swept.good:
        assert [record["step"] for record in records(run, "train")] == [1, 2, 3, 4]
        assert swept.rows[run.name]["state"] == "finished"


def test_a_failed_run_is_a_row_and_does_not_end_the_sweep(swept: SimpleNamespace) -> None:
    assert swept.code == 2
    failed = swept.rows["block_size=48"]
    assert failed["state"] == "failed" and failed["message"].startswith("dataset"), failed
    assert len(swept.rows) == 3 and failed["rank"] is None
    page = (swept.folder / "sweep.html").read_text()
    text = (swept.folder / "sweep.md").read_text()
    assert "Runs that failed" in page and "Runs that failed" in text
    assert failed["message"] in (swept.folder / ".sweep" / "block_size=48.log").read_text()


def test_the_rows_are_of_the_runs_files_and_ranked_by_their_rule(swept: SimpleNamespace) -> None:
    """The rule: answer_accuracy desc, then eval_loss asc; of each run its best step."""
    best = {}
    for run in swept.good:
        found = [
            (-record["scores"]["answer_accuracy"]["value"], record["eval_loss"], record["step"])
            for record in records(run, "eval")
            if record["step"]
        ]
        best[run.name] = min(found)
        row, facts = swept.rows[run.name], json.loads((run / "run.json").read_text())
        assert row["best_step"] == best[run.name][2]
        assert row["metrics"]["eval_loss"]["value"] == best[run.name][1]
        accuracy = row["metrics"]["answer_accuracy"]
        assert accuracy["count"] == 4 and 0 == accuracy["low"] < accuracy["high"] < 1
        assert row["data"] == facts["fingerprints"]["data"]
        assert row["held_out"] == facts["fingerprints"]["eval"]
        assert row["trained_parameters"] == facts["plan"]["trained_parameters"]
        budget = facts["plan"]["budget"]
        assert row["block_size"] == budget["block_size"] == int(run.name.rpartition("=")[2])
        per_update = budget["supervised_tokens_per_update"]["mean"]
        assert row["supervised_tokens_per_update"] == per_update
        assert row["supervised_tokens"] == round(4 * per_update)
        assert row["seconds"] == pytest.approx(facts["goodput"]["wall_seconds"])
        assert row["parameterization"] == "all weights"
        assert row["varied"] == {"dataset.block_size": run.name.rpartition("=")[2]}
    order = sorted(best, key=lambda name: best[name][:2])
    assert [row["run"] for row in swept.table["rows"]][:2] == order
    assert [row["rank"] for row in swept.table["rows"]] == [1, 2, None]
    assert swept.table["winner"] == order[0]
    assert "The runs have 2 different sets of training rows." in swept.table["notes"]


def test_the_winners_config_can_be_run(swept: SimpleNamespace) -> None:
    made = yaml.safe_load((swept.folder / swept.table["winner"] / "config.yaml").read_text())
    again = compose_config(["-cd", str(swept.folder), "-cn", "winner"]).to_dict()
    other = {"output_dir", "run_name", "resume"}
    assert {k: v for k, v in again.items() if k not in other} == {
        k: v for k, v in made.items() if k not in other
    }


def test_a_report_of_any_runs(
    swept: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = (swept.folder / "sweep.md").read_text()
    assert torchprime(["sweep", "report", str(swept.folder)]) == 0
    assert (swept.folder / "sweep.md").read_text() == made
    # Copies are runs that no sweep made: what differs is in their configs.
    for number, run in enumerate(swept.good):
        shutil.copytree(run, tmp_path / f"copy_{number}")
    copies = [str(path) for path in sorted(tmp_path.iterdir())]
    assert torchprime(["sweep", "report", *copies]) == 2
    assert "--out: given nothing with 2 folders" in capsys.readouterr().err
    assert torchprime(["sweep", "report", *copies, "--out", str(tmp_path / "out")]) == 0
    table = json.loads((tmp_path / "out" / "sweep.json").read_text())
    varied = [row["varied"] for row in sorted(table["rows"], key=lambda row: row["run"])]
    assert varied == [{"dataset.block_size": size} for size in SIZES]
    assert torchprime(["sweep", "report", str(tmp_path / "out")]) == 2
    assert "holds no run" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("program", ["torch_xla_models.train", "torch_native.train"])
def test_each_entry_point_makes_a_sweep(program: str, tmp_path: Path) -> None:
    argv = ["-cn", "quickstart", *SMALL, f"output_dir={tmp_path}", "-m", "seed=1,2", "mesh=single"]
    done = subprocess.run(
        [sys.executable, "-m", f"torchprime.{program}", *argv],
        env={key: value for key, value in os.environ.items() if key not in INHERITED},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    for seed in (1, 2):
        run = tmp_path / "quickstart_sweep_seed" / f"seed={seed}"
        command = json.loads((run / "run.json").read_text())["command"]
        assert f'run_name="seed={seed}"' in command and f"seed={seed}" in command


@pytest.mark.slow
def test_runs_on_xla_with_the_same_step_share_its_compile(tmp_path: Path) -> None:
    """Three runs in one process: the later ones compile nothing, and their numbers are those of a
    process of their own."""
    process = start(tmp_path, "task.optimizer.learning_rate=0.001,0.01,0.003", backend="xla")
    _, said = process.communicate()
    assert process.returncode == 0, said
    folder = tmp_path / "quickstart_sweep_learning_rate"
    runs = [folder / f"learning_rate={rate}" for rate in ("0.001", "0.01", "0.003")]
    spent = [json.loads((run / "run.json").read_text())["goodput"]["seconds"] for run in runs]
    assert spent[0]["compile"] > 1
    assert [seconds["compile"] for seconds in spent[1:]] == pytest.approx([0, 0], abs=0.5)
    alone = start(tmp_path, "task.optimizer.learning_rate=0.003", "run_name=alone", backend="xla")
    assert alone.wait() == 0
    other = tmp_path / "alone" / "quickstart"
    for kind, names in (("train", ("loss", "grad_norm", "batch_hash")), ("eval", ("eval_loss",))):
        both = [[[r[n] for n in names] for r in records(run, kind)] for run in (runs[2], other)]
        assert both[0] == both[1]
