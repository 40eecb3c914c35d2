"""The inputs of a run: the fixed date of its template, its stop tokens and its fingerprints."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from torchprime.config.load import load_config
from torchprime.config.schema import TrainConfig
from torchprime.data.templates.render import ChatTemplate
from torchprime.training.setup import inputs as module
from torchprime.training.setup.inputs import RunInputs
from torchprime.training.setup.model_files import ModelFiles

CONFIG = load_config(
    {
        "dataset": {"file_dataset_path": "rows.jsonl"},
        "model": {"pretrained_model": "some/checkpoint"},
        "task": {
            "name": "sft",
            "global_batch_size": 12,
            "gradient_accumulation_steps": 3,
            "max_steps": 10,
        },
    }
)
ROWS = SimpleNamespace(
    fingerprints=lambda: {"data": "d", "tokenizer": "t"},
    train=SimpleNamespace(stop_ids=lambda: [9, 4, 2]),
)
FILES = cast(
    ModelFiles,
    SimpleNamespace(tokenizer=SimpleNamespace(eos_id=4), fingerprint=lambda: "m"),
)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Read the inputs with a given template; the rows are not prepared."""
    asked: list[Any] = []

    def make(template: ChatTemplate | None, config: TrainConfig = CONFIG) -> RunInputs:
        def prepare(config: TrainConfig, tokenizer: object, given: object, say: object) -> object:
            asked[:] = [config.dataset.template_date, given]
            return ROWS

        monkeypatch.setattr(module, "template_of", lambda *given: template)
        monkeypatch.setattr(module, "prepare_run_data", prepare)
        found = RunInputs.read(config, FILES, "2026-11-29", print)
        assert asked == [found.config.dataset.template_date, template]
        return found

    return make


def test_the_date_that_a_template_writes_becomes_part_of_the_config(read: Any) -> None:
    found = read(ChatTemplate("dated", "{{ strftime_now('%Y') }}", date="2026-11-29"))
    assert found.config.dataset.template_date == "2026-11-29"
    kept = replace(found.config, dataset=replace(found.config.dataset, template_date=None))
    assert kept == CONFIG, "nothing else of the config changes"


@pytest.mark.parametrize("template", [None, ChatTemplate("plain", "{{ messages }}")])
def test_other_templates_leave_the_config_as_it_is(read: Any, template: object) -> None:
    found = read(template)
    assert found.config == CONFIG and found.template is template


def test_sizes_and_types_are_those_of_the_config(read: Any) -> None:
    assert read(None).micro_batch_size == 4  # 12 blocks in 3 micro-batches
    for name, dtype in (("bfloat16", torch.bfloat16), ("float32", torch.float32)):
        assert read(None, replace(CONFIG, torch_dtype=name)).dtype == dtype


def test_an_answer_ends_at_eos_or_at_a_turns_own_end(read: Any) -> None:
    assert read(None).stop_ids == (2, 4, 9)


def test_the_identity_names_the_model_and_the_rows(read: Any) -> None:
    expected = {"model": "m", "base": None, "fisher": None, "data": "d", "tokenizer": "t"}
    assert read(None).identity() == expected
    assert replace(read(None), base="b").identity() == expected | {"base": "b"}
