"""The dataset section: combinations of values that it refuses, by key."""

from __future__ import annotations

import re
from typing import Any

import pytest

from torchprime.config.load import load_config
from torchprime.config.sections.dataset import DatasetConfig, MixturePart
from torchprime.errors import ConfigError

ROWS = {"file_dataset_path": "rows.jsonl"}
A = {"name": "a", "file_dataset_path": "a.jsonl"}
B = {"name": "b", "hf_dataset_name": "x/y", "replay": True, "columns": {"prompt": "q"}}


REPLAY = {**B, "split": "train"}
START, END = "dataset.replay_schedule.start", "dataset.replay_schedule.end"


def config_of(**dataset: Any) -> dict[str, Any]:
    return {
        "dataset": dataset,
        "model": {"pretrained_model": "some/checkpoint"},
        "task": {"name": "sft", "global_batch_size": 8, "max_steps": 10},
    }


def message_of(**dataset: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(config_of(**dataset))
    return str(caught.value)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"block_size": 1}, "dataset.block_size: given 1, expected at least 2"),
        ({"num_proc": 0}, "dataset.num_proc: given 0, expected at least 1"),
        ({"weight_key": "weight"}, "dataset.weight_key: given 'weight', expected another column"),
        (
            {"weight_key": "x", "columns": {"weight": "x"}},
            "dataset.weight_key: given 'x', expected another column",
        ),
        ({"max_row_characters": 0}, "dataset.max_row_characters: given 0"),
        ({"max_unreadable_rows": -1}, "dataset.max_unreadable_rows: given -1"),
        ({"max_rejected_fraction": 1.5}, "dataset.max_rejected_fraction: given 1.5"),
        ({"split": ""}, "dataset.split: given ''"),
        ({"id_key": " "}, "dataset.id_key: given ' '"),
        ({"template_date": "29.11.2026"}, "dataset.template_date: given '29.11.2026'"),
        ({"format": "text", "compute_loss_on": "completion"}, "have no completion"),
        ({"turns": "branch", "compute_loss_on": "all"}, "dataset.turns: given 'branch'"),
        (
            {"eval_fraction": 1},
            "dataset.eval_fraction: given 1.0, expected a fraction",
        ),
        ({"eval_fraction": 0}, "dataset.eval_fraction: given 0.0, expected a fraction above 0"),
        ({"eval_fraction": 0.1, "max_train_examples": 5}, "null together with dataset.eval_fra"),
        ({"time_key": "when"}, "dataset.time_key: given 'when', expected null"),
        ({"leak_threshold": 1.5}, "dataset.leak_threshold: given 1.5"),
        ({"leak_threshold": 0}, "dataset.leak_threshold: given 0.0"),
        ({"instruction_marker": "Q:"}, "null, since dataset.response_marker is null"),
        ({"response_marker": "A:", "instruction_marker": "A:"}, "another text than"),
        ({"response_marker": "A:", "format": "messages"}, "dataset.response_marker: given 'A:'"),
        ({"response_marker": "A:", "compute_loss_on": "all"}, "auto, since"),
        ({"replay_share": 0.1}, "null, since dataset.mixture is empty"),
        ({"mixture": [A]}, "dataset.mixture: given together with"),
    ],
)
def test_a_combination_is_refused_by_its_key(values: dict[str, Any], said: str) -> None:
    assert said in message_of(**ROWS, **values)


@pytest.mark.parametrize(
    "values",
    [
        {"format": "text", "compute_loss_on": "all"},
        {"turns": "branch", "compute_loss_on": "last_assistant"},
        {"eval_fraction": 0.1, "time_key": "when"},
        {"response_marker": "A:", "instruction_marker": "Q:", "format": "text"},
        {"leak_threshold": 1.0, "block_size": 2, "max_unreadable_rows": 0},
        {"template_date": "2026-11-29", "max_rejected_fraction": 1.0},
    ],
)
def test_the_nearest_combination_is_accepted(values: dict[str, Any]) -> None:
    found = load_config(config_of(**ROWS, **values)).dataset
    assert {name: getattr(found, name) for name in values} == values


def test_rows_need_exactly_one_source() -> None:
    assert "dataset.hf_dataset_name and dataset.file_dataset_path: given null" in message_of()
    both = message_of(**ROWS, hf_dataset_name="x/y")
    assert "given 'x/y' and 'rows.jsonl', expected only one" in both
    assert "hf_dataset_config_name" in message_of(**ROWS, hf_dataset_config_name="main")


def test_a_mixture_is_read() -> None:
    given = config_of(mixture=[A | {"weight": 2}, B], replay_share=0.2)
    config = load_config(given)
    assert config.dataset.mixture == [
        MixturePart("a", file_dataset_path="a.jsonl", weight=2.0),
        MixturePart("b", hf_dataset_name="x/y", replay=True, columns={"prompt": "q"}),
    ]
    assert load_config(config.to_dict()) == config, "what a run writes down can be read again"


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"mixture": [{"name": "a"}]}, "dataset.mixture[0].file_dataset_path: given null"),
        ({"mixture": [A | {"wieght": 1}]}, "dataset.mixture[0].wieght"),
        ({"mixture": [A | {"weight": 0}]}, "dataset.mixture[0].weight"),
        ({"mixture": [A | {"name": ""}]}, "dataset.mixture[0].name"),
        ({"mixture": [A, A]}, "a name of its own for each part"),
        ({"mixture": {"a": 1}}, "a list of sections"),
        ({"mixture": [A, B], "replay_share": 1.0}, "dataset.replay_share: given 1.0"),
        ({"mixture": [A, B], "max_train_examples": 5}, "weights decide how many"),
    ],
)
def test_a_mixture_that_cannot_be(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        load_config(config_of(**values))


def test_the_defaults_keep_every_row_of_the_train_split() -> None:
    config = DatasetConfig(file_dataset_path="rows.jsonl")
    assert (config.split, config.format, config.packing, config.truncation) == (
        *("train", "auto", "bfd", "drop"),
    )
    assert config.max_unreadable_rows == 0 and config.eval_fraction is None


@pytest.mark.parametrize(
    ("schedule", "said"),
    [
        ({"start": 0.2}, f"{END}: given null, expected the share at the last step"),
        ({"end": 0.2}, f"{START}: given null, expected the share at the first step"),
        ({"start": 1.0, "end": 0.1}, f"{START}: given 1.0"),
        ({"start": 0.1, "end": -0.1}, f"{END}: given -0.1"),
        ({"start": 0.0, "end": 0.0}, f"{START}: given 0.0, expected a share above 0"),
        ({"start": 0.1, "end": 0.2, "shape": "constant"}, f"{END}: given 0.2, expected null"),
        ({"start": 0.1, "end": 0.2, "shape": "cosin"}, "Did you mean dataset.replay_schedule.sh"),
    ],
)
def test_a_schedule_of_replay_is_checked(schedule: dict[str, Any], said: str) -> None:
    assert said in message_of(mixture=[A, REPLAY], replay_schedule=schedule)


def test_a_schedule_of_replay_needs_both_kinds_and_a_length() -> None:
    given = {"start": 0.2, "end": 0.1}
    no_mixture = message_of(**ROWS, replay_schedule=given)
    assert f"{START}: given 0.2, expected null, since dataset.mixture is empty" in no_mixture
    one_kind = message_of(mixture=[A], replay_schedule=given)
    assert f"{START}: given 0.2, expected null, since 0 of 1 parts" in one_kind
    both = message_of(mixture=[A, REPLAY], replay_schedule=given, replay_share=0.1)
    assert "dataset.replay_share: given 0.1, expected null, since dataset.replay_schedule" in both
    endless = config_of(mixture=[A, REPLAY], replay_schedule=given)
    assert load_config(endless).dataset.replay_schedule.enabled
    endless["task"] |= {"max_steps": None, "num_epochs": 2.0}
    with pytest.raises(ConfigError, match="task.max_steps: given null, expected the length of"):
        load_config(endless)
