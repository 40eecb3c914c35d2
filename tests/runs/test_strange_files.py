"""A stranger's model folder with strange values: it works, or it is one message; never a traceback.

hypothesis puts values of any JSON type under the keys that config.json, generation_config.json and
the tokenizer's settings have, and looks at all that a run does with them before its first step.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from logging import CRITICAL
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, GenerationConfig, logging

from torchprime.checkpoint.hf.card import CardFacts
from torchprime.checkpoint.hf.write import WeightLayout
from torchprime.errors import CheckpointError, UserError
from torchprime.training.run.export import Exporter
from torchprime.training.setup.model_files import find_model, pretrained_tensors

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
TOKENIZER_KEYS = [
    *("eos_token", "bos_token", "pad_token", "unk_token", "additional_special_tokens"),
    *("add_bos_token", "add_eos_token", "added_tokens_decoder", "extra_special_tokens"),
    *("chat_template", "model_max_length", "tokenizer_class", "clean_up_tokenization_spaces"),
    *("padding_side", "legacy", "model_input_names", "sp_model_kwargs", "use_fast", "backend"),
    *("add_prefix_space", "name_or_path", "auto_map", "processor_class", "split_special_tokens"),
]
CONFIG_KEYS = sorted(
    {
        *(key for family in FAMILIES for key in AutoConfig.for_model(family).to_dict()),
        *("rope_scaling", "rope_theta", "torch_dtype", "quantization_config", "text_config"),
        *("layer_types", "sliding_window", "num_labels", "auto_map", "is_causal", "decoder"),
        *("per_layer_config", "tokenizer_class", "attn_implementation", "name_or_path"),
    }
)
KEYS = {
    "config.json": CONFIG_KEYS,
    "generation_config.json": sorted(vars(GenerationConfig())),
    "tokenizer_config.json": TOKENIZER_KEYS,
    "special_tokens_map.json": TOKENIZER_KEYS[:5],
}
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 64),
    st.sampled_from([2**31, 2**63, 10**30, -(10**30), 1e308, 1e-308, float("inf"), float("nan")]),
    st.floats(-2, 2),
    st.sampled_from(["", "</s>", "<pad>", "auto", "float16", "linear", "../x", "\ud800", "é" * 9]),
    st.sampled_from(["LlamaTokenizer", "PreTrainedTokenizerFast", "{{ x", "default"]),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(
            st.sampled_from(["content", "rope_type", "factor", "0", "name", "template", "x"]),
            inner,
            max_size=3,
        ),
    ),
    max_leaves=5,
)
CHANGES = st.lists(
    st.sampled_from([(file, key) for file, keys in KEYS.items() for key in keys]).flatmap(
        lambda place: st.tuples(st.just(place), VALUES)
    ),
    min_size=1,
    max_size=2,
)


@pytest.fixture(autouse=True)
def quiet():
    before = logging.get_verbosity()
    logging.set_verbosity(CRITICAL)
    yield
    logging.set_verbosity(before)


def look(folder: Path, out: Path) -> list[str]:
    """Read a model's folder as a run does; the lines it says."""
    said: list[str] = []
    files = find_model(
        pretrained_model=str(folder),
        tokenizer_name=None,
        architecture=None,
        cache_dir=None,
        weights=True,
    )
    pretrained_tensors(files, torch.float32)
    exporter = Exporter(
        files,
        layout=WeightLayout(files.shapes, torch.float32, 10**9),
        card=CardFacts(base_model=str(folder)),
        template=None,
        stop_ids=[files.tokenizer.eos_id],
        fingerprints={},
        say=said.append,
    )
    exporter.check(out)
    return said


def strange(source: Path, folder: Path, changes: list[tuple[tuple[str, str], Any]]) -> None:
    """A copy of a model's folder with other values."""
    for path in source.iterdir():
        shutil.copyfile(path, folder / path.name)
    for (file, key), value in changes:
        path = folder / file
        content = json.loads(path.read_text()) if path.is_file() else {}
        path.write_text(json.dumps({**content, key: value}))


def assert_told(source: Path, changes: list[tuple[tuple[str, str], Any]]) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "model"
        folder.mkdir()
        strange(source, folder, changes)
        try:
            look(folder, Path(name) / "out")
        except UserError as error:
            assert len(str(error)) < 4000
            str(error).encode()


@settings(
    max_examples=30,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),  # pyright: ignore[reportArgumentType]
)
@given(changes=CHANGES)
def test_strange_values_are_taken_or_told(tiny: Path, changes) -> None:
    assert_told(tiny, changes)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@settings(
    max_examples=500,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),  # pyright: ignore[reportArgumentType]
)
@given(changes=CHANGES)
def test_many_strange_values_are_taken_or_told(tiny: Path, changes) -> None:
    assert_told(tiny, changes)


@pytest.mark.parametrize("file", [*KEYS, "tokenizer.json", "chat_template.jinja"])
@pytest.mark.parametrize("kind", ["pipe", "device", "deep", "twice"])
def test_no_file_of_a_model_is_waited_for(tiny: Path, tmp_path: Path, file: str, kind: str) -> None:
    if kind in ("deep", "twice") and file.endswith(".jinja"):
        pytest.skip("a template is no JSON")
    folder = tmp_path / "model"
    folder.mkdir()
    strange(tiny, folder, [])
    path = folder / file
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.write_text("[" * 10**5 if kind == "deep" else '{"a": 1, "a": 2}')
    with pytest.raises(CheckpointError, match=file):
        look(folder, tmp_path / "out")
