"""The small files of an exported folder: all of them, or a refusal that names what contradicts."""

from __future__ import annotations

import json

import pytest
import torch

from torchprime.errors import CheckpointError


def test_all_files_but_the_weights_are_written(make_hf_folder, llama, tmp_path) -> None:
    folder = make_hf_folder(llama, dtype=torch.bfloat16, generation_config={"temperature": 0.5})
    assert folder.write_small_files(tmp_path, "# mine\n") == folder.check()
    names = {path.name for path in tmp_path.iterdir()}
    assert names >= {"config.json", "generation_config.json", "tokenizer.json", "README.md"}
    assert not list(tmp_path.glob("*.safetensors*"))
    assert (tmp_path / "README.md").read_text() == "# mine\n"
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    assert json.loads((tmp_path / "generation_config.json").read_text())["temperature"] == 0.5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"eos_token_id": 9999}, "9999 is not in"),
        ({"config": {"model_type": "llama", "vocab_size": 321}}, "vocab_size"),
    ],
)
def test_a_contradiction_is_found_without_weights(make_hf_folder, llama, change, message) -> None:
    change = {key: {**llama.config, **v} if key == "config" else v for key, v in change.items()}
    with pytest.raises(CheckpointError, match=message):
        make_hf_folder(llama, **change).check()


def test_templates_that_were_trained_with_replace_the_tokenizers(
    make_hf_folder, llama, tmp_path
) -> None:
    folder = make_hf_folder(llama, chat_templates={"default": "{{ messages }}"})
    folder.write_small_files(tmp_path, "")
    assert (tmp_path / "chat_template.jinja").read_text() == "{{ messages }}"
