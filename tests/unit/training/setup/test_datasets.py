"""A config's rows, without a run: what was found out about them once is not read again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from torchprime.config.compose import compose_config
from torchprime.data.tokenizer.load import load_tokenizer
from torchprime.errors import DataError
from torchprime.training.setup import datasets


def said_of(
    command: Callable[..., list[str]], tiny: Path, folder: Path, train: list, held_out: list
) -> list[str]:
    """The notes that a person is given while these rows are prepared."""
    paths = []
    for name, rows in (("train", train), ("held_out", held_out)):
        paths.append(folder / f"{name}.jsonl")
        paths[-1].write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = (
        f"dataset.file_dataset_path={paths[0]}",
        f"eval.file_dataset_path={paths[1]}",
        f"dataset.prepared_dir={folder}/prepared",
    )
    said: list[str] = []
    config = compose_config(command(*given))
    datasets.prepare_run_data(config, load_tokenizer(tiny), None, said.append)
    return [line for line in said if line.startswith("note: ")]


def test_what_a_person_should_look_at_is_said(
    command: Callable[..., list[str]], tiny: Path, tmp_path: Path
) -> None:
    pairs = [{"prompt": f"{n} + 1?", "completion": f" {n + 1}"} for n in range(8)]
    asked = [{"question": f"{n} - 1?", "answer": f"{n - 1}"} for n in range(8)]
    assert said_of(command, tiny, tmp_path, pairs, pairs) == []
    about = "A text of more than forty characters, number {}."
    context = [row | {"context": about.format(n)} for n, row in enumerate(pairs)]
    for _ in range(2):  # what is found prepared says it again
        assert said_of(command, tiny, tmp_path, context, asked) == [
            "note: column context looks like input but is not used, e.g. 'A text of more than "
            "forty characters, number 0.': map it (dataset.columns) or put it into the question",
            "note: held-out rows are read as question_answer, training rows as prompt_completion. "
            "If that is not meant, set dataset.format or correct the rows",
        ]


def test_names_on_the_hub_are_those_of_training_rows_from_there(
    command: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "rows").mkdir(parents=True)
    places = ["hf_dataset_name: a/b", "hf_dataset_name: data/rows", "file_dataset_path: c/d"]
    parts = ", ".join(f"{{name: p{i}, weight: 1, {place}}}" for i, place in enumerate(places))
    mixed = ["dataset.file_dataset_path=null", f"dataset.mixture=[{parts}]"]
    assert datasets.RunRows.of(compose_config(command(*mixed))).hub_names() == ["a/b"]
    assert datasets.RunRows.of(compose_config(command())).hub_names() == []


def test_a_run_keeps_its_split(
    command: Callable[..., list[str]], tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The held-out rows that a person is shown are of the split that was planned for training."""
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"{n} + 1?", "completion": f" {n + 1}"} for n in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    plan_split, planned = datasets.plan_split, []

    def counted(*given: Any) -> Any:
        planned.append(given)
        return plan_split(*given)

    monkeypatch.setattr(datasets, "plan_split", counted)
    config = compose_config(
        command(
            f"dataset.file_dataset_path={path}",
            "dataset.eval_fraction=0.3",
            f"dataset.prepared_dir={tmp_path}/prepared",
        )
    )
    data = datasets.prepare_run_data(config, load_tokenizer(tiny), None, lambda _: None)
    shown = data.sources.first_heldout(40)
    assert data.heldout_report is not None
    rows = data.heldout_report.to_dict()["rows"]
    assert isinstance(rows, int) and 0 < len(shown) == rows < 40
    assert {row.row_id for row in shown}.isdisjoint(
        {row.row_id for row in data.sources.rows("train")}
    )
    assert len(planned) == 1


def test_a_folders_splits_are_the_sections_rows(
    command: Callable[..., list[str]], tmp_path: Path
) -> None:
    for name in ("train", "validation"):
        row = {"prompt": f"{name}?", "completion": "yes"}
        (tmp_path / f"{name}-00000-of-00001.jsonl").write_text(json.dumps(row) + "\n")
    given = (f"dataset.file_dataset_path={tmp_path}", f"eval.file_dataset_path={tmp_path}")
    rows = datasets.RunRows.of(compose_config(command(*given, "eval.split=validation")))
    prompts = {side: [row.prompt for row in rows.rows(side)] for side in ("train", "eval")}
    assert prompts == {"train": ["train?"], "eval": ["validation?"]}
    unset = datasets.RunRows.of(compose_config(command(*given)))
    with pytest.raises(DataError, match="eval.split is not set. Set eval.split to one of them"):
        list(unset.rows("eval"))


def test_a_held_out_source_without_a_row_is_refused(
    command: Callable[..., list[str]], tiny: Path, tmp_path: Path
) -> None:
    """Its loss would be a metric that no step has, so no step could pass a gate on it."""
    rows = {"own": {"prompt": "a?", "completion": "b"}, "general": {"text": ""}}
    listed = []
    for name, row in rows.items():
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
        listed.append(f"{{name: {name}, file_dataset_path: {tmp_path}/{name}.jsonl}}")
    config = compose_config(
        command(f"eval.sources=[{', '.join(listed)}]", "dataset.max_rejected_fraction=0.9",
                f"dataset.prepared_dir={tmp_path}/prepared")
    )  # fmt: skip
    with pytest.raises(DataError, match=r"eval.sources\[1\]: general has no usable row"):
        datasets.prepare_run_data(config, load_tokenizer(tiny), None, lambda _: None)
