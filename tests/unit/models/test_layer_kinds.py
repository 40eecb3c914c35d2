"""Kinds of layers from a config, and their division into groups that repeat."""

from __future__ import annotations

import random
from typing import Any

import pytest
from transformers import AutoConfig

from torchprime.errors import CheckpointError
from torchprime.models.architecture import architecture_from_hf
from torchprime.models.layer_kinds import FULL, SLIDING, Group, repeating_groups

QWEN: dict[str, Any] = {
    "model_type": "qwen3",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "use_sliding_window": True,
    "sliding_window": 4,
}


@pytest.mark.parametrize(
    "keys",
    [
        {"max_window_layers": 1},
        {"max_window_layers": 9},
        {"layer_types": [SLIDING, FULL, SLIDING, FULL]},
        {"layer_types": [FULL, FULL, SLIDING, SLIDING], "max_window_layers": 0},
        {"use_sliding_window": False},
    ],
)
def test_windows_are_those_of_transformers(keys: dict) -> None:
    config = {**QWEN, **keys}
    read = AutoConfig.for_model(**config)
    theirs = [read.sliding_window if kind == SLIDING else None for kind in read.layer_types]
    assert [kind.window for kind in architecture_from_hf(config).layers] == theirs


@pytest.mark.parametrize("types", [["sliding_attention"], [SLIDING, FULL, "chunked_attention"] * 2])
def test_a_list_that_does_not_fit_is_refused(types: list[str]) -> None:
    with pytest.raises(CheckpointError, match="layer_types is .* a list of 4 times"):
        architecture_from_hf({**QWEN, "layer_types": types})


OLMO: dict[str, Any] = {
    **{key: value for key, value in QWEN.items() if "window" not in key},
    **{"model_type": "olmo3", "sliding_window": 4},
}
YARN = {"factor": 2.0, "original_max_position_embeddings": 16}


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"rope_scaling": {"type": "yarn", **YARN}}, "rope_scaling.type is 'yarn', expected null"),
        (
            {"rope_scaling": {"rope_type": "yarn", "truncate": False, **YARN}},
            "truncate is false in rope_scaling",
        ),
        ({"rope_theta": 1e4}, "rope_theta is 10000.0, expected 500000.0"),
        ({"rope_parameters": {"rope_theta": 5e5}}, "rope_parameters.rope_theta is 500000.0"),
        ({"sliding_window": None}, "sliding_window is missing, expected a number"),
        (
            {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}},
            "rope_theta is 10000 for full layers .* and 500000 for layers with a window",
        ),
    ],
)
def test_keys_that_readers_read_differently_are_refused(keys: dict, said: str) -> None:
    architecture_from_hf(OLMO)
    with pytest.raises(CheckpointError, match=said):
        architecture_from_hf({**OLMO, **keys})


@pytest.mark.parametrize(
    ("kinds", "groups"),
    [
        ("aaaa", [Group(0, 1, 4)]),
        ("a", [Group(0, 1, 1)]),
        ("aabbb", [Group(0, 1, 2), Group(2, 1, 3)]),
        ("lllllg" * 4 + "ll", [Group(0, 6, 4), Group(24, 1, 2)]),
        ("lg" * 13, [Group(0, 2, 13)]),
        ("lglgl", [Group(0, 2, 2), Group(4, 1, 1)]),
        ("abc", [Group(0, 1, 1), Group(1, 1, 1), Group(2, 1, 1)]),
    ],
)
def test_groups(kinds: str, groups: list[Group]) -> None:
    assert repeating_groups(kinds) == groups


def test_groups_have_every_layer_once_and_repeat() -> None:
    draw = random.Random(3)
    for _ in range(200):
        kinds = draw.choices("ab", k=draw.randint(1, 40))
        layers = []
        for group in repeating_groups(kinds):
            stacks = [group.stack(place) for place in range(group.period)]
            for stack in stacks:
                assert len({kinds[layer] for layer in stack}) == 1 and len(stack) == group.repeats
            layers += [layer for repeat in zip(*stacks, strict=True) for layer in repeat]
        assert layers == list(range(len(kinds)))
