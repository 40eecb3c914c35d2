"""The data system through the main job: conversations, mixtures, splits, leaks, what is kept."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from interrupted import Killed
from transformers import AutoTokenizer

from torchprime.config.entry import run_main
from torchprime.data.templates import choose as templates
from torchprime.data.templates.choose import FOLDER
from torchprime.metrics.writers import read_metrics
from torchprime.torch_native.train import main as native

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """A JSON Lines file; the job runs beside it."""
    monkeypatch.chdir(tmp_path)

    def make(name: str, rows: list[dict[str, Any]]) -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return make


def turns(question: str, answer: str) -> dict[str, Any]:
    roles = (("user", question), ("assistant", answer))
    return {"messages": [{"role": role, "content": content} for role, content in roles]}


def pairs(count: int, **more: Any) -> list[dict[str, Any]]:
    return [{"prompt": f"{n} + 1?", "completion": f" {n + 1}", **more} for n in range(count)]


def texts(count: int) -> list[dict[str, Any]]:
    return [{"text": f"text {n} says {n * n}"} for n in range(count)]


def test_a_mixture_of_chats_and_pairs(command, run, write: Write, tmp_path: Path, capsys) -> None:
    chats = write("chats.jsonl", [turns(f"say {n}", f"{n}!") for n in range(30)])
    plain = write("plain.jsonl", pairs(30))
    config = tmp_path / "mixed.yaml"
    config.write_text(
        "defaults: [default, override /dataset: file, _self_]\n"
        "dataset:\n"
        "  mixture:\n"
        f"    - {{name: chats, file_dataset_path: {chats}, weight: 2}}\n"
        f"    - {{name: plain, file_dataset_path: {plain}, weight: 1}}\n"
    )
    argv = command(
        "dataset.file_dataset_path=null", "dataset.chat_template=chatml", "logging_steps=1",
        "task.export_checkpoint_path=export", "run_name=mixed", "task.max_steps=3",
        "dataset.block_size=128",
    )  # fmt: skip
    argv = [each for each in argv if not each.startswith("dataset=")]
    assert run(["--config-dir", str(tmp_path), "--config-name", "mixed", *argv]) == 0
    printed = capsys.readouterr().err
    assert "isolation    proved on" in printed
    assert "15 examples of plain beyond its share are not used" in printed
    assert "note: <|im_start|>, <|im_end|> of the chatml template" in printed

    folder = tmp_path / "outputs" / "mixed"
    for record in read_metrics(folder / "metrics.jsonl"):
        losses = {name: loss for name, loss in record["source_losses"].items() if loss is not None}
        assert losses.keys() <= {"chats", "plain"} and losses
        low, high = min(losses.values()), max(losses.values())
        assert low - 1e-5 <= record["loss"] <= high + 1e-5, "the mean of its parts"
    template = (FOLDER / "chatml.jinja").read_text()
    exported = json.loads((folder / "export/tokenizer_config.json").read_text())["chat_template"]
    assert exported.endswith(template), "what was trained with is exported"
    assert (folder / "export/chat_template.jinja").read_text() == exported
    prints = json.loads((folder / "run.json").read_text())["fingerprints"]
    assert prints["template"] and prints["data_version"]


def test_a_split_by_group(command, run, write: Write, tmp_path: Path, capsys) -> None:
    rows = [{**row, "thread": f"t{n // 4}"} for n, row in enumerate(pairs(80))]
    path = write("threads.jsonl", rows)
    argv = command(
        f"dataset.file_dataset_path={path}", "dataset.eval_fraction=0.3",
        "dataset.group_key=thread", "run_name=split", "task.max_steps=2",
        "task.export_checkpoint_path=export", "task.sample_prompts=2",
    )  # fmt: skip
    assert run(argv) == 0
    report = json.loads((tmp_path / "outputs/split/data_report.json").read_text())
    train, held_out = report["dataset"], report["eval"]
    assert train["rows"] + held_out["rows"] == 80
    assert train["rows"] % 4 == held_out["rows"] % 4 == 0, "a thread was divided"
    assert 0 < held_out["rows"] < 48
    assert report["leaks"]["num_shared_groups"] == 0
    evals = [
        r for r in read_metrics(tmp_path / "outputs/split/metrics.jsonl") if r["kind"] == "eval"
    ]
    assert [record["step"] for record in evals] == [0, 2]
    printed = capsys.readouterr().err
    assert "found prepared" not in printed
    assert "2 held-out questions, greedy answers before and after" in printed
    assert len(re.findall(r"^  question +\d+ \+ 1\?$", printed, re.MULTILINE)) == 2


def test_a_leak_is_fatal_when_asked(command, run, write: Write, tmp_path: Path, capsys) -> None:
    train, held_out = write("train.jsonl", pairs(40)), write("heldout.jsonl", pairs(45)[38:])
    argv = command(
        f"dataset.file_dataset_path={train}", "eval=file", f"eval.file_dataset_path={held_out}",
        "dataset.leak_check=error", "run_name=leaky",
    )  # fmt: skip
    assert run(argv) == 2
    message = capsys.readouterr().err
    assert "2 of 7 eval rows are in train (2 exact pairs" in message
    assert "train.jsonl:39 and heldout.jsonl:1 (1.00)" in message
    assert "dataset.leak_check=warn" in message and "Traceback" not in message
    assert not (tmp_path / "outputs").exists()
    assert run([*argv, "dataset.leak_check=warn", "dry_run=true"]) == 0
    assert "leak check: 2 of 7 eval rows are in train" in capsys.readouterr().err


def test_as_messages_asks_as_a_server_would(command, run, write: Write, capsys) -> None:
    path = write("rows.jsonl", [{"question": f"{n}?", "answer": f"{n}!"} for n in range(20)])
    argv = command(
        f"dataset.file_dataset_path={path}", "dataset.as_messages=true", "dry_run=true",
        "dataset.chat_template=zephyr",
    )  # fmt: skip
    assert run(argv) == 0
    printed = capsys.readouterr().err
    assert "as question_answer; chat template zephyr; 20 examples" in printed


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("dataset.chat_template=chatlm", "chatml"),
        ("dataset.chat_template=nowhere.jinja", "there is no such file"),
        ("dataset.prepared_dir=/proc/none", "dataset.prepared_dir=/proc/none"),
        ("dataset.columns={qestion: x}", "question"),
    ],
)
def test_what_cannot_be(override: str, said: str, command, run, write: Write, capsys) -> None:
    path = write("rows.jsonl", pairs(5))
    assert run(command(f"dataset.file_dataset_path={path}", override, "dry_run=true")) == 2
    message = capsys.readouterr().err
    assert said in message and "Traceback" not in message


DATED = (
    "{{ strftime_now('%d') }}{% for t in tools or [] %}{{ t.function.name }}{% endfor %}"
    "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% else %}"
    "{% generation %}{{ m.content + eos_token }}{% endgeneration %}{% endif %}{% endfor %}"
    "{% if quiet %}{{ quiet }}{% endif %}"
)


def test_a_resumed_run_keeps_the_templates_date(
    cut_short, run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    (tmp_path / "dated.jinja").write_text(DATED)
    monkeypatch.setattr(templates, "today", lambda: "2024-07-26")
    more = ("dataset.as_messages=true", f"dataset.chat_template={tmp_path}/dated.jinja")
    folder, argv = cut_short(3, *more)
    capsys.readouterr()
    monkeypatch.setattr(templates, "today", lambda: "2024-07-27")  # the next day
    assert run(argv) == 0
    assert "resuming from" in capsys.readouterr().err
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["dataset"]["template_date"] == "2024-07-26"
    report = json.loads((folder / "data_report.json").read_text())["dataset"]
    assert report["cached"]  # the rows that were prepared the day before


def test_tools_options_and_branches_end_to_end(
    command, run, tiny: Path, write: Write, tmp_path: Path
) -> None:
    tool = {"type": "function", "function": {"name": "tide"}}
    rows = [{**turns(f"{n}?", f"{n}!"), "tools": [tool]} for n in range(12)]
    for row in rows:
        row["messages"] += turns("so", "yes")["messages"]
    path = write("tools.jsonl", rows)
    folder = tmp_path / "model"
    shutil.copytree(tiny, folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    listed = [
        {"name": "default", "template": DATED.replace("strftime_now('%d')", "'x'")},
        {"name": "tool_use", "template": DATED.replace("strftime_now('%d')", "'tools:'")},
    ]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": listed}))
    argv = command(
        f"model.pretrained_model={folder}", f"dataset.file_dataset_path={path}",
        "dataset.turns=branch", "dataset.template_options={quiet: ''}", "run_name=tools",
        "task.max_steps=2", "task.export_checkpoint_path=export",
    )  # fmt: skip
    assert run(argv) == 0
    out = tmp_path / "outputs/tools"
    report = json.loads((out / "data_report.json").read_text())["dataset"]
    assert (report["rows"], report["examples"]) == (12, 24)
    certificate = json.loads((out / "export/certificate.json").read_text())
    (check,) = (c for c in certificate["checks"] if c["name"] == "chat template")
    assert check["passed"] and check["values"]["options"] == {"quiet": ""}
    assert check["values"]["tools_sha256"] != check["values"]["sha256"]
    served = AutoTokenizer.from_pretrained(out / "export")
    asked = [{"role": "user", "content": "1?"}]
    assert served.apply_chat_template(asked, tools=[tool], tokenize=False) == "tools:tide1?"
    assert served.apply_chat_template(asked, tokenize=False) == "x1?"
    assert "default-chat-template-kwargs" in (out / "export/README.md").read_text()


def test_markers_and_their_mistakes(command, run, write: Write, capsys) -> None:
    path = write("texts.jsonl", [{"text": f"Q: {n}? A: {n}!"} for n in range(9)])
    argv = command(
        f"dataset.file_dataset_path={path}", "dry_run=true", "dataset.response_marker=A:"
    )
    assert run(argv) == 0
    assert "as text" in capsys.readouterr().err
    assert run([*argv, "dataset.response_marker=Answer"]) == 2
    assert "none of the 9 rows can be used: the text has no response marker: 9" in (
        capsys.readouterr().err
    )
    other = write("pairs.jsonl", pairs(5))
    assert run([*argv, f"dataset.file_dataset_path={other}"]) == 2
    assert "dataset.response_marker='A:' is for rows of text" in capsys.readouterr().err


def test_a_schedule_of_replay(
    command: Callable[..., list[str]], write: Write, tmp_path: Path,
    killed_after: Callable[[int], None], capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """The batches hold the planned shares; a run that was killed goes on with the same ones."""
    own, general = write("own.jsonl", pairs(60)), write("general.jsonl", texts(30))
    parts = f"{{name: own, file_dataset_path: {own}}}, "
    parts += f"{{name: web, file_dataset_path: {general}, replay: true}}"
    argv = command(
        "dataset.file_dataset_path=null", f"dataset.mixture=[{parts}]", "task.max_steps=12",
        "dataset.replay_schedule.start=0.5", "dataset.replay_schedule.end=0.1",
        "logging_steps=1", "checkpoint.every_steps=5", "ici_mesh.fsdp=1", "ici_mesh.tensor=1",
        "checkpoint.asynchronous=false", "task.export_checkpoint_path=null",
    )  # fmt: skip
    assert run_main(native, [*argv, "run_name=whole"]) == 0
    said = capsys.readouterr().err
    assert "replay       50.0% to 10.0% (linear) of the supervised tokens, " in said
    killed_after(5)
    with pytest.raises(Killed):
        run_main(native, [*argv, "run_name=killed"])
    assert run_main(native, [*argv, "run_name=killed"]) == 0
    fields = ("step", "loss", "epoch", "batch_hash", "source_losses")
    whole, killed = (
        [
            [record[field] for field in fields]
            for record in read_metrics(tmp_path / f"outputs/{name}/metrics.jsonl")
            if record["kind"] == "train"
        ]
        for name in ("whole", "killed")
    )
    assert whole == killed and len(whole) == 12
    assert {name for record in whole for name in record[-1]} == {"own", "web"}
    plan = json.loads((tmp_path / "outputs/whole/run.json").read_text())["plan"]["replay"]
    assert plan["share"] == pytest.approx(0.3, abs=0.05)
    assert f"{plan['share']:.2%} over the run; {plan['passes']:.2f} passes over its" in said
    assert plan["own_passes"] == whole[-1][2]
    longer = [*argv, "run_name=killed", "resume=10", "task.max_steps=20"]
    assert run_main(native, longer) == 2
    assert "refused      task.max_steps: 12 -> 20" in capsys.readouterr().err
