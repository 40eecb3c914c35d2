"""The names of a source in messages and row ids."""

from __future__ import annotations

import pytest

from torchprime.data.files.source import SourceSpec


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"file_dataset_path": "rows/*.jsonl"}, "rows/*.jsonl"),
        ({"hf_dataset_name": "openai/gsm8k"}, "openai/gsm8k:train"),
        (
            {"hf_dataset_name": "openai/gsm8k", "hf_dataset_config_name": "main", "split": "test"},
            "openai/gsm8k/main:test",
        ),
    ],
)
def test_a_source_is_described_as_the_user_gave_it(given: dict[str, str], told: str) -> None:
    assert SourceSpec(**given).describe() == told


def test_the_name_of_a_mixtures_part_begins_its_row_ids() -> None:
    assert SourceSpec(file_dataset_path="a.jsonl").label("a.jsonl:3") == "a.jsonl:3"
    assert SourceSpec(file_dataset_path="a.jsonl", name="replay").label("a.jsonl:3") == (
        "replay/a.jsonl:3"
    )


def test_the_split_and_section_are_those_of_training_unless_given() -> None:
    assert (SourceSpec().split, SourceSpec().section) == ("train", "dataset")
