"""A path means the same for every key: `~`, file://, URLs, and what is refused with a way out."""

from __future__ import annotations

import dataclasses
import os
import typing
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import pytest

from torchprime.config.load import load_config
from torchprime.config.paths import PathRule, checked_path, local_path, place
from torchprime.config.schema import TrainConfig
from torchprime.errors import ConfigError

BASE: dict[str, Any] = {
    "dataset": {"file_dataset_path": "rows.jsonl"},
    "model": {"pretrained_model": "some/checkpoint"},
    "task": {"name": "sft", "global_batch_size": 8, "max_steps": 10},
}
NO_PATHS = {  # texts that are no paths; a new text key has to be put here or get a rule
    "compile_only", "run_name", "dataset.split", "dataset.hf_dataset_config_name",
    "dataset.template_date", "dataset.response_marker", "dataset.instruction_marker",
    "dataset.id_key", "dataset.group_key", "dataset.time_key", "dataset.weight_key",
    "eval.hf_dataset_config_name", "eval.split", "selection.early_stopping.metric",
    "metrics.project",
}  # fmt: skip


def hints(cls: Any = TrainConfig, prefix: str = "") -> dict[str, tuple[Any, PathRule | None]]:
    """(type, rule) of every key that takes a text."""
    found: dict[str, tuple[Any, PathRule | None]] = {}
    for name, hint in typing.get_type_hints(cls, include_extras=True).items():
        if dataclasses.is_dataclass(hint):
            found |= hints(hint, f"{prefix}{name}.")
            continue
        for kind in [hint, *get_args(hint)]:
            if get_origin(kind) is Annotated:
                found[f"{prefix}{name}"] = get_args(kind)
                break
            if kind is str and get_origin(hint) not in (list, dict):
                found[f"{prefix}{name}"] = (str, None)
    return found


PATHS = {key: rule for key, (_, rule) in hints().items() if rule is not None}


def test_every_text_key_is_a_path_or_none() -> None:
    assert {key for key, (_, rule) in hints().items() if rule is None} == NO_PATHS
    assert {key for key, rule in PATHS.items() if rule.instead is None} == {
        "checkpoint.folder", "dataset.file_dataset_path", "eval.file_dataset_path",
        "resume.source", "task.export_checkpoint_path",
    }  # fmt: skip


def config_with(key: str, value: str) -> TrainConfig:
    tree: dict[str, Any] = {name: dict(section) for name, section in BASE.items()}
    *sections, leaf = key.split(".")
    node = tree
    for section in sections:
        node = node.setdefault(section, {})
    node[leaf] = value
    if leaf == "compile_libtpu":
        node["compile_only"] = "v6e-1"
    if leaf == "fisher":
        node["strength"] = 0.5
    if leaf == "hf_dataset_name":
        node["file_dataset_path"] = None
        node.setdefault("split", "train")
    return load_config(tree)


def value_of(config: TrainConfig, key: str) -> object:
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    return value


@pytest.mark.parametrize("key", PATHS)
def test_home_and_urls_for_every_key(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/users/me")
    assert value_of(config_with(key, "~/there"), key) == "/users/me/there"
    assert value_of(config_with(key, "file:///there/x"), key) == "/there/x"
    assert value_of(config_with(key, "there/x"), key) == "there/x"
    for wrong, said in (("gz://b/x", "Did you mean"), ("~no_one_/x", "no user no_one_"),
                        ("gs:/b/x", "Did you mean gs://b/x?"), (" ", "' '")):  # fmt: skip
        with pytest.raises(ConfigError) as caught:
            config_with(key, wrong)
        assert str(caught.value).startswith(f"{key}: given {wrong!r}"), caught.value
        assert said in str(caught.value)
    instead = PATHS[key].instead
    if instead is None:
        assert value_of(config_with(key, "gs://b/x"), key) == "gs://b/x"
        with pytest.raises(ConfigError, match=r"Write gs://BUCKET/FOLDER"):
            config_with(key, "gs://")
    else:
        with pytest.raises(ConfigError) as caught:
            config_with(key, "gs://b/x")
        assert "not a URL" in str(caught.value) and instead in str(caught.value)


def test_a_part_of_a_mixture_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/users/me")
    parts = [{"name": "a", "file_dataset_path": "~/rows.jsonl"}]
    tree = {**BASE, "dataset": {"mixture": parts}}
    assert load_config(tree).dataset.mixture[0].file_dataset_path == "/users/me/rows.jsonl"
    parts[0]["file_dataset_path"] = "s4://b/rows.jsonl"
    with pytest.raises(ConfigError, match=r"dataset.mixture\[0\].file_dataset_path.*s3://"):
        load_config(tree)


def test_a_name_that_only_looks_like_a_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a:b", "12:30", "x/gs:/y"):
        assert place("--out", name) == name
    os.mkdir("gs:")
    assert place("--out", "gs:/") == "gs:/", "it is there, and is what is meant"
    with pytest.raises(ConfigError, match="--out: given .*NUL"):
        place("--out", "a\0b")
    assert checked_path("x", "zip://a.txt::s3://b/c.zip", PathRule()) == "zip://a.txt::s3://b/c.zip"
    with pytest.raises(ConfigError, match="DIR: given 's3://b/x', expected a path on this machine"):
        local_path("DIR", "s3://b/x")


def test_an_unproved_export_is_not_sent() -> None:
    task = {**BASE["task"], "convert_to_safetensors": False}
    task["export_checkpoint_path"] = "gs://b/x"
    with pytest.raises(ConfigError, match="task.export_checkpoint_path.*convert_to_safetensors"):
        load_config({**BASE, "task": task})
