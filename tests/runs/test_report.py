"""The report of a run: what is in it, and that nothing a row or an answer holds gets out of it.

The run is a small one with an export; answers and their grades are put into its folder as an
evaluation would.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import interrupted
import pytest
import yaml

from torchprime.cli.main import main as torchprime
from torchprime.config.entry import run_main
from torchprime.errors import DataError
from torchprime.report.curves import thinned, ticks
from torchprime.report.write import write_report
from torchprime.torch_native.train import main as native
from torchprime.training.finish import report_run

EVIL = '</pre><script>alert(1)</script>" onload="x" \x1b[31m\u202e ``` ````\n# not a heading | <b>'
SCORE = {"count": 4, "low": 0.1, "high": 0.9, "interval": "wilson"}


class Page(HTMLParser):
    """Elements with their attributes, and the text outside of style."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.path: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self.path.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while self.path and self.path.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if "style" not in self.path:
            self.text += data


@pytest.fixture(scope="module")
def whole(
    command: Callable[..., list[str]],
    rows: tuple[Path, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A run of 12 steps on one device. Not to be changed."""
    folder = tmp_path_factory.mktemp("reported") / "whole"
    one = ("ici_mesh.fsdp=1", "ici_mesh.tensor=1")
    assert run_main(native, command(*interrupted.overrides(folder, rows[1]), *one)) == 0
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """A copy of the run, to be changed."""
    return Path(shutil.copytree(whole, tmp_path / "whole"))


def change_config(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    config = yaml.safe_load((folder / "config.yaml").read_text())
    change(config)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))


def change_records(folder: Path, change: Callable[[dict[str, Any]], bool]) -> None:
    """Keep the records for which `change`, which may edit them, returns True."""
    path = folder / "metrics.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(r) + "\n" for r in records if change(r)))


def sample(row: int, output: str, right: float | None) -> str:
    values = {"row_id": f"rows.jsonl:{row}", "prompt": f"ask {row}", "output": output}
    values |= {"reference": f"ref {row}", "stopped": True, "tokens": 3, "grades": {"right": right}}
    return json.dumps(values, ensure_ascii=False) + "\n"


@pytest.fixture
def graded(folder: Path) -> Path:
    """Steps 0, 6 and 12 with answers to four rows; the best is step 6."""

    def grade(config: dict[str, Any]) -> None:
        config["eval"]["graders"] = [{"name": "right", "kind": "non_empty"}]
        config["selection"]["ranking"] = ["right desc", "eval_loss asc"]

    change_config(folder, grade)
    values = {0: 0.25, 6: 0.75, 12: 0.5}

    def score(record: dict[str, Any]) -> bool:
        if record["kind"] == "eval":
            record["scores"] = {"right": {"value": values[record["step"]], **SCORE}}
        return True

    change_records(folder, score)
    (folder / "evaluations").mkdir()
    grades = {0: (0, 0, 1, 0), 6: (1, 1, 0, 0), 12: (1, 0, 0, 0)}
    for step, each in grades.items():
        lines = [sample(n, f"answer {n} of step {step}\u2028{EVIL}", g) for n, g in enumerate(each)]
        (folder / "evaluations" / f"step_{step:08d}.jsonl").write_text("".join(lines))
    return folder


def reports(folder: Path) -> tuple[str, Page]:
    write_report(folder)
    return (folder / "report.md").read_text(), Page((folder / "report.html").read_text())


def test_a_run_writes_it_at_its_end(whole: Path) -> None:
    markdown, page = (whole / "report.md").read_text(), Page((whole / "report.html").read_text())
    records = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    losses = [r["eval_loss"] for r in records if r["kind"] == "eval"]
    facts = json.loads((whole / "run.json").read_text())
    data = json.loads((whole / "data_report.json").read_text())
    certificate = json.loads((whole / "export" / "certificate.json").read_text())
    passed = sum(check["passed"] is True for check in certificate["checks"])
    for text in (markdown, page.text):
        assert all(f"{loss:,.4f}" in text for loss in (losses[0], losses[-1]))
        assert "All 12 steps are done." in text and "is the best of the evaluated ones" in text
        assert facts["fingerprints"]["data"] in text and facts["versions"]["torch"] in text
        assert f"{data['dataset']['rows']} rows from" in text and "eval rows are in train" in text
        assert f"{passed} checks passed" in text
        assert re.search(r"s for 3, \d+\.\d% of the run", text)
    titles = [attrs["aria-label"] for tag, attrs in page.elements if tag == "svg"]
    assert [title and title.split(",")[0] for title in titles] == [
        *("Loss", "Learning rate", "Gradient norm"),
    ]
    # 12 logged steps and three evaluations are drawn, all of them.
    lines = [str(attrs["points"]).split() for tag, attrs in page.elements if tag == "polyline"]
    assert [len(points) for points in lines] == [12, 3, 12, 12]


def test_it_loads_nothing_and_runs_nothing(graded: Path) -> None:
    _, page = reports(graded)
    html = (graded / "report.html").read_text()
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "link", "img", "iframe", "object", "embed", "form", "image", "use"}
    links = [attrs["href"] for _, attrs in page.elements if "href" in attrs]
    assert links and all(str(link).startswith("#") for link in links)
    ids = {attrs.get("id") for _, attrs in page.elements}
    assert {str(link)[1:] for link in links} <= ids
    assert not [name for _, attrs in page.elements for name in attrs if name.startswith("on")]
    policy = next(a["content"] for t, a in page.elements if "http-equiv" in a)
    assert policy == "default-src 'none'; style-src 'unsafe-inline'"
    assert "url(" not in html and "@import" not in html and "src=" not in html


def test_answers_are_side_by_side_and_stay_texts(graded: Path) -> None:
    markdown, page = reports(graded)
    html = (graded / "report.html").read_text()
    for text in (markdown, page.text):
        assert all(
            f"answer {row} of step {step}" in text for row in range(4) for step in (0, 6, 12)
        )
        assert "2 now right, 1 now wrong, 1 still wrong" in text
        assert "base" in text and "last (step 12)" in text and "best (step 6)" in text
        assert "75.0% (10.0 to 90.0)" in text and "Step 6 is the best" in text
        assert "\x1b" not in text and "\u202e" not in text and "\u2028" not in text
        order = [text.index(f"rows.jsonl:{row}") for row in (0, 1, 2, 3)]
        assert order == sorted(order)
    assert page.text.count("alert(1)") == 12 and "<script" not in html
    # In Markdown every answer is inside a fence that it does not close.
    outside, fence = [], None
    for line in markdown.split("\n"):
        if fence is None and line.startswith("```"):
            fence = re.match("`+", line)[0]  # type: ignore[index]
        elif fence is not None:
            fence = None if line == fence else fence
        else:
            outside.append(line)
    assert fence is None and not [line for line in outside if "script" in line or "not a" in line]


@pytest.mark.parametrize(
    ("kind", "selection", "lower"),
    [
        ("non_empty", {}, False),
        ("refusal", {}, True),
        ("refusal", {"ranking": ["right desc"]}, False),
        ("non_empty", {"ranking": ["eval_loss asc", "right asc"], "gates": ["right >= 0.1"]}, True),
        ("non_empty", {"gates": ["right <= 0.1"]}, True),
        ("refusal", {"gates": ["right > 0.1"]}, False),
        ("refusal", {"gates": ["right > 0.1", "right < 0.9"]}, True),
        ("refusal", {"early_stopping": {"metric": "right", "mode": "max"}}, False),
        ("non_empty", {"early_stopping": {"metric": "right", "mode": "min"}}, True),
    ],
)
def test_what_is_right_follows_the_direction(
    graded: Path, kind: str, selection: dict[str, Any], lower: bool
) -> None:
    """The grades of rows 0 and 1 go from 0 to 1, of row 2 from 1 to 0, of row 3 stay at 0."""

    def change(config: dict[str, Any]) -> None:
        config["eval"]["graders"][0]["kind"] = kind
        config["selection"]["ranking"] = ["eval_loss asc"]
        stopping = config["selection"]["early_stopping"] | selection.get("early_stopping", {})
        config["selection"] |= selection | {"early_stopping": stopping}

    change_config(graded, change)
    samples = graded / "evaluations"
    (samples / "step_00000006.jsonl").replace(samples / "step_00000012.jsonl")
    counts = {
        False: "2 now right, 1 now wrong, 1 still wrong",
        True: "1 now right, 2 now wrong, 1 still right",
    }[lower]
    for text in (reports(graded)[0], reports(graded)[1].text):
        assert counts in text
        assert ("Lower is better: right." in text) is lower
    assert ("right (lower is better)" in reports(graded)[1].text) is lower


@pytest.mark.parametrize(
    ("which", "path", "made", "told"),
    [
        ("best", "export", True, "the last one is exported instead."),
        ("best", "export", False, "no export was made."),
        ("best", None, False, "nothing is exported, since task.export_checkpoint_path is null."),
        ("last", "export", True, "(the last one: not right >= 0.9)."),
    ],
)
def test_an_export_is_told_of_only_if_it_was_made(
    graded: Path, which: str, path: str | None, made: bool, told: str
) -> None:
    def change(config: dict[str, Any]) -> None:
        config["selection"]["gates"] = ["right >= 0.9"]
        config["export"]["which"] = which
        config["task"]["export_checkpoint_path"] = path

    change_config(graded, change)
    if not made:
        shutil.rmtree(graded / "export")
    markdown, page = reports(graded)
    assert told in " ".join(markdown.split()) and told in page.text
    assert ("is exported" in page.text) is (made and which == "best" or path is None)


def test_names_are_escaped(graded: Path) -> None:
    path = graded / "run.json"
    facts = json.loads(path.read_text())
    facts |= {"command": "train.py run_name=<script>x</script>|*y*"}
    facts["mesh"] |= {"fsdp": 2, "tensor": 4}
    path.write_text(json.dumps(facts))
    markdown, page = reports(graded)
    assert r"run_name=&lt;script>x&lt;/script>\|\*y\*" in markdown
    assert "run_name=<script>x</script>|*y*" in page.text
    assert "1 x CPU: fsdp 2 x tensor 4" in page.text and "1 x CPU: fsdp 2 x tensor 4" in markdown


def test_a_best_step_is_marked_and_bands_are_drawn(graded: Path) -> None:
    _, page = reports(graded)
    bands = [a["points"] for tag, a in page.elements if tag == "polygon"]
    assert len(bands) == 1 and len(str(bands[0]).split()) == 6  # three above, three below
    heights = [float(point.split(",")[1]) for point in str(bands[0]).split()]
    assert heights[0] == min(heights) and heights[-1] == max(heights)
    marks = [a for tag, a in page.elements if a.get("class") == "best"]
    assert len(marks) == 4 and len({mark["x1"] for mark in marks}) == 1


def test_runs_of_every_kind_have_one(graded: Path) -> None:
    """Only some evaluations, none, no samples, no export, several starts, cut short."""
    (graded / "evaluations" / "step_00000012.jsonl").unlink()
    assert "answer 0 of step 6" in reports(graded)[0]
    shutil.rmtree(graded / "evaluations")
    assert "## Answers" not in reports(graded)[0]
    change_records(graded, lambda r: r["kind"] != "eval" or r["step"] == 12)
    markdown, page = reports(graded)
    assert "last = best (step 12)" in markdown and "|  | base" not in markdown
    assert [t for t, a in page.elements if t == "polygon"] == []
    change_records(graded, lambda r: r["kind"] != "eval")
    markdown, page = reports(graded)
    assert "What training changed" not in markdown + page.text
    change_config(graded, lambda c: c["task"].update(export_checkpoint_path=None))
    assert "The config asks for none." in reports(graded)[0]
    path = graded / "run.json"
    facts = json.loads(path.read_text())
    path.write_text(json.dumps(facts | {"starts": [{"step": 0}, {"step": 5}, {"step": 9}]}))
    change_records(graded, lambda r: r["kind"] == "train" and r["step"] <= 10)
    for text in (reports(graded)[0], reports(graded)[1].text):
        assert "started 3 times; it resumed after step 5, 9" in text
        assert "the run is not finished: step 10 of 12" in text
    (graded / "metrics.jsonl").write_text("")
    assert "No step was logged." in reports(graded)[1].text


def test_what_was_decided_is_said(graded: Path) -> None:
    def decide(config: dict[str, Any]) -> None:
        config["selection"]["gates"] = ["right >= 0.9"]
        config["export"]["which"] = "best"
        config["selection"]["early_stopping"] = {
            "metric": "right", "mode": "max", "patience": 1, "min_delta": 0.0,
        }  # fmt: skip

    change_config(graded, decide)

    def overfit(record: dict[str, Any]) -> bool:
        if record["kind"] == "eval":
            place = record["step"] / 6
            record |= {"eval_loss": 1 + place, "train_loss": 9 - place}
        return record["step"] <= 12

    change_records(graded, overfit)
    path = graded / "run.json"
    facts = json.loads(path.read_text())
    facts["plan"]["total_steps"] = 100
    path.write_text(json.dumps(facts))
    for text in (reports(graded)[0], reports(graded)[1].text):
        assert "Early stopping after step 12 of 100: right has not improved" in text
        assert "no step qualifies by right >= 0.9" in text and "the last one is exported" in text
        assert "overfitting: from step 0 to 12 the held-out loss rose from 1.0000" in text


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("config.yaml", None, "config.yaml is missing"),
        ("run.json", '{"command": 1', "run.json: cannot be read"),
        ("run.json", "[]", "run.json: cannot be read (it is list)"),
        ("run.json", "{}", "lacks what a run writes there (KeyError: 'plan')"),
        ("metrics.jsonl", None, "metrics.jsonl: cannot be read"),
        ("metrics.jsonl", "{}\n", "lacks what a run writes there (KeyError: 'kind')"),
        ("data_report.json", None, "data_report.json is missing"),
        ("evaluations/step_00000006.jsonl", "nothing\n", "step_00000006.jsonl, line 1: given"),
        ("evaluations/step_00000006.jsonl", b"\xff\n", "step_00000006.jsonl: cannot be read"),
        ("export/certificate.json", "{}", "certificate.json has format None"),
    ],
)
def test_damage_is_one_message(
    graded: Path, name: str, content: str | bytes | None, told: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    path = graded / name
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert torchprime(["report", str(graded)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and told in said and "Traceback" not in said


def test_the_command_makes_it_again_elsewhere(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert torchprime(["report", str(whole), "--out", str(tmp_path / "there")]) == 0
    said = capsys.readouterr().out.split()
    assert [Path(path).name for path in said] == ["report.md", "report.html"]
    for name in ("report.md", "report.html"):
        assert (tmp_path / "there" / name).read_text() == (whole / name).read_text()
    assert torchprime(["report", str(tmp_path / "nowhere")]) == 2
    (tmp_path / "file").write_text("")
    assert torchprime(["report", str(whole), "--out", str(tmp_path / "file")]) == 2
    assert capsys.readouterr().err.count("error: ") == 2


def test_a_run_does_not_fail_by_its_report(folder: Path) -> None:
    said: list[str] = []
    report_run(folder, said.append)
    (folder / "run.json").write_text("[]")
    report_run(folder, said.append)
    assert "report.html" in said[0] and said[1].startswith("no report: DataError: ")
    with pytest.raises(DataError):
        write_report(folder)


def test_thinned_keeps_what_stands_out() -> None:
    points = [(step, 1.0 + step % 3) for step in range(10_000)]
    points[4321], points[77] = (4321, 99.0), (77, -5.0)
    kept = thinned(points, 100)
    assert len(kept) <= 100 and (4321, 99.0) in kept and (77, -5.0) in kept
    assert kept == sorted(kept) and thinned(points[:100], 100) == points[:100]


@pytest.mark.parametrize(
    ("low", "high", "wanted"),
    [(0, 1, [0, 0.25, 0.5, 0.75, 1]), (0, 12, [0, 5, 10]), (1.1, 1.9, [1.2, 1.4, 1.6, 1.8])],
)
def test_ticks_are_round(low: float, high: float, wanted: list[float]) -> None:
    assert ticks(low, high) == pytest.approx(wanted)
