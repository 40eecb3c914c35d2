"""Every message about a value: it names the key, what was given, what was expected and the fix."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from torchprime.config.load import known_keys, load_config, nearest, schema_defaults
from torchprime.config.schema import TrainConfig
from torchprime.errors import ConfigError

VALID: dict[str, Any] = {
    "dataset": {"file_dataset_path": "rows.jsonl"},
    "model": {"pretrained_model": "some/checkpoint"},
    "task": {"name": "sft", "global_batch_size": 8, "max_steps": 10},
}


def with_values(**values: Any) -> dict[str, Any]:
    """VALID with dotted keys (written with __) set."""
    tree = copy.deepcopy(VALID)
    for dotted, value in values.items():
        *sections, leaf = dotted.split("__")
        node = tree
        for section in sections:
            node = node.setdefault(section, {})
        node[leaf] = value
    return tree


OWN = {"name": "own", "file_dataset_path": "own.jsonl"}
OTHER = {"name": "other", "file_dataset_path": "other.jsonl"}


def message_of(**values: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(with_values(**values))
    return str(caught.value)


def test_defaults_are_filled_in() -> None:
    config = load_config(VALID)
    assert config.seed == 42
    assert config.dataset.block_size == 1024
    assert config.task.optimizer.weight_decay == 0.0
    assert config.mesh_shape() == {"data": 1, "fsdp": 1, "expert": 1, "context": 1, "tensor": 1}
    assert config.device_count == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 1  # type: ignore[misc]


def test_mesh_is_ici_times_dcn_outermost_first() -> None:
    config = load_config(
        with_values(
            ici_mesh={"fsdp": 4, "tensor": 2}, dcn_mesh={"data": 3}, task__global_batch_size=24
        )
    )
    assert list(config.mesh_shape().items()) == [
        ("data", 3),
        ("fsdp", 4),
        ("expert", 1),
        ("context", 1),
        ("tensor", 2),
    ]
    assert config.device_count == 24


def test_what_is_written_is_read_back() -> None:
    config = load_config(
        with_values(
            task__optimizer__learning_rate=3e-7,
            sharding__parameters={"model.*.weight": ["tensor", ["data", "fsdp"], None]},
            model__architecture={"model_type": "llama", "rope_scaling": {"factor": 8.0}},
        )
    )
    text = yaml.safe_dump(config.to_dict())
    assert load_config(yaml.safe_load(text)) == config


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("task__max_steps", "abc", ["task.max_steps", "'abc'", "whole number", "100"]),
        ("task__max_steps", 1.5, ["task.max_steps", "1.5", "whole number"]),
        ("task__max_steps", 0, ["task.max_steps", "0", "at least 1"]),
        ("task__max_steps", True, ["task.max_steps", "true", "whole number"]),
        ("task__optimizer__learning_rate", "fast", ["learning_rate", "'fast'", "a number"]),
        ("task__optimizer__learning_rate", -1.0, ["learning_rate", "-1.0", "above 0"]),
        ("task__optimizer__learning_rate", float("nan"), ["learning_rate", "nan", "above 0"]),
        ("task__optimizer__weight_decay", float("inf"), ["weight_decay", "inf"]),
        ("task__optimizer__betas", [0.9], ["betas", "[0.9]", "list of 2 numbers"]),
        ("task__optimizer__betas", [0.9, 1.0], ["betas[1]", "1.0", "less than 1"]),
        (
            "task__optimizer__name",
            "adam",
            ["one of adamw, adafactor, muon", "mean", "=adamw"],
        ),
        ("task__lr_scheduler__name", "cosin", ["linear, cosine, constant", "=cosine"]),
        ("task__lr_scheduler__warmup_ratio", 5, ["warmup_ratio", "5", "0 to 1", "0.05"]),
        ("task__name", "stf", ["task.name", "'stf'", "train, sft", "task.name=sft"]),
        ("task__max_grad_norm", 0, ["task.max_grad_norm", "above 0"]),
        ("task__loss__average", "rows", ["task.loss.average", "'rows'", "tokens, examples"]),
        ("task__loss__label_smoothing", 1.0, ["label_smoothing", "1.0", "less than 1"]),
        ("task__loss__label_smoothing", float("nan"), ["task.loss.label_smoothing", "nan"]),
        ("task__loss__z_loss", -1e-4, ["task.loss.z_loss", "-0.0001", "at least 0"]),
        ("task__loss__dft", "yes", ["task.loss.dft", "'yes'", "true or false"]),
        ("task__sample_prompts", 3, ["task.sample_prompts", "held-out", "eval=gsm8k_test"]),
        ("task__optimizer", "adamw", ["task.optimizer", "'adamw'", "section", "learning_rate"]),
        ("torch_dtype", "bf16", ["torch_dtype", "'bf16'", "bfloat16"]),
        ("dry_run", "yes", ["dry_run", "'yes'", "true or false"]),
        ("run_name", 123, ["run_name", "123", "text", "in quotes"]),
        ("run_name", "a/b", ["run_name", "'a/b'", "one folder", "output_dir"]),
        ("run_name", "..", ["run_name", "one folder"]),
        ("output_dir", " ", ["output_dir", "' '"]),
        ("seed", -1, ["seed", "-1", "seed=42"]),
        ("seed", None, ["seed", "null", "whole number"]),
        ("logging_steps", 0, ["logging_steps", "at least 1"]),
        ("profile_start_step", 3, ["profile_end_step", "both or neither"]),
        ("dataset__max_rejected_fraction", 1.5, ["max_rejected_fraction", "1.5"]),
        ("dataset__packing", "best_fit", ["dataset.packing", "none, bfd", "=none"]),
        ("dataset__packing", "best", ["'best'", "none, bfd, bfd_split, wrapped"]),
        ("dataset__format", "message", ["dataset.format", "'message'", "=messages"]),
        ("dataset__compute_loss_on", "answers", ["dataset.compute_loss_on", "'answers'", "auto"]),
        ("dataset__truncation", "middle", ["'middle'", "drop, left, right, split, error"]),
        ("dataset__turns", "wholes", ["dataset.turns", "'wholes'", "dataset.turns=whole"]),
        ("dataset__reasoning", "inlined", ["'inlined'", "dataset.reasoning=inline"]),
        ("dataset__answer_form", "think", ["'think'", "as_is, think_answer"]),
        ("dataset__columns", {"question": 3}, ["dataset.columns['question']", "3", "text"]),
        ("dataset__hf_dataset_name", "a/b", ["only one", "hf_dataset_name=null"]),
        ("dataset__hf_dataset_config_name", "main", ["dataset.hf_dataset_config_name", "null"]),
        ("dataset__file_dataset_path", None, ["one of the two", "dataset=gsm8k"]),
        ("eval__every_steps", 5, ["eval.every_steps", "no held-out rows"]),
        ("eval__hf_dataset_name", "a/b", ["eval.split", "eval.split=test"]),
        ("eval__sources", [OWN], ["eval.sources", "['own']", "two or more sources"]),
        ("eval__sources", [OWN, OWN], ["eval.sources", "['own', 'own']", "name of its own"]),
        ("eval__sources", [OWN, {"name": "b"}], ["eval.sources[1]", "dataset", "file"]),
        ("eval__sources", [OWN, {**OWN, "name": "a]"}], ["eval.sources[1].name", "without ["]),
        (
            "eval__sources",
            [OWN, {"name": "b", "hf_dataset_name": "a/b"}],
            ["eval.sources[1].split", "Set eval.sources[1].split=test"],
        ),
        ("ici_mesh__expert", 2, ["ici_mesh.expert", "2", "not supported yet"]),
        ("dcn_mesh__context", 4, ["dcn_mesh.context", "4", "not supported yet"]),
        ("ici_mesh__fsdp", 0, ["ici_mesh.fsdp", "at least 1"]),
        ("model__pretrained_model", None, ["model.pretrained_model", "sft", "task=train"]),
        ("sharding__parameters", {"a": ["tensr"]}, ["['a'][0]", "'tensr'", "=tensor"]),
        ("sharding__parameters", {"a": "fsdp"}, ["['a']", "'fsdp'", "one entry per dim"]),
        ("sharding__parameters", {"a": [3]}, ["['a'][0]", "3", "an axis"]),
        ("sharding__activations", {"a": ["fsdp", ["fsdp"]]}, ["activations['a']", "twice"]),
        ("sharding__parameters", [1], ["sharding.parameters", "mapping"]),
    ],
)
def test_message_about_a_value(key: str, value: Any, expected: list[str]) -> None:
    message = message_of(**{key: value})
    for part in expected:
        assert part in message, message


def test_both_lengths_are_refused() -> None:
    message = message_of(task__num_epochs=3)
    for part in ("task.max_steps", "10", "task.num_epochs", "3.0", "task.max_steps=null"):
        assert part in message
    assert "one of the two" in message_of(task__max_steps=None)
    epochs = load_config(with_values(task__max_steps=None, task__num_epochs=3))
    assert epochs.task.num_epochs == 3.0


def test_both_warmups_are_refused() -> None:
    message = message_of(task__lr_scheduler={"warmup_steps": 5, "warmup_ratio": 0.1})
    assert "warmup_steps" in message and "warmup_ratio=null" in message


def test_profile_window() -> None:
    message = message_of(profile_start_step=5, profile_end_step=5)
    assert "profile_end_step: given 5" in message and "profile_start_step=5" in message
    late = message_of(profile_start_step=10, profile_end_step=12)
    assert "profile_start_step: given 10" in late and "task.max_steps=10" in late
    load_config(with_values(profile_start_step=5, profile_end_step=7))


def test_training_from_scratch_needs_architecture_and_tokenizer() -> None:
    scratch = {"model__pretrained_model": None, "task__name": "train"}
    assert "model.architecture: given null" in message_of(**scratch)
    scratch["model__architecture"] = {"model_type": "llama"}
    assert "model.tokenizer_name: given null" in message_of(**scratch)
    load_config(with_values(**scratch, model__tokenizer_name="some/tokenizer"))


def test_batch_message_has_the_whole_equation() -> None:
    message = message_of(
        task__global_batch_size=18,
        task__gradient_accumulation_steps=2,
        ici_mesh={"fsdp": 2, "tensor": 8},
        dcn_mesh={"data": 3},
    )
    for part in (
        "task.global_batch_size: given 18",
        "multiple of 12",
        "data 3 (ici 1 x dcn 3)",
        "fsdp 2 (ici 2 x dcn 1)",
        "gradient_accumulation_steps 2",
        "18 / 12 leaves 6",
        "task.global_batch_size=24",
    ):
        assert part in message, message


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("task__max_stepz", "task.max_steps"),
        ("max_steps", "task.max_steps"),
        ("learning_rate", "task.optimizer.learning_rate"),
        ("task__learning_rate", "task.optimizer.learning_rate"),
        ("dataset__blocksize", "dataset.block_size"),
        ("model__pretrained", "model.pretrained_model"),
        ("ici_mesh__fdsp", "ici_mesh.fsdp"),
        ("task__lr_scheduler__warmup", "task.lr_scheduler.warmup_"),
        ("logging_step", "logging_steps"),
    ],
)
def test_unknown_key_names_the_nearest(key: str, meant: str) -> None:
    message = message_of(**{key: 7})
    assert message.startswith(f"{key.replace('__', '.')}: given 7")
    assert f"Did you mean {meant}" in message


def test_unknown_key_like_no_other_lists_the_section() -> None:
    listed = "Keys of remat: scan_layers, policy, save, offload, recompute, optimization_barrier"
    assert listed in message_of(remat__zzzzzzzz=1)
    assert "Top-level keys: dataset, eval" in message_of(zzz=1)


def test_only_a_loops_inputs_can_be_offloaded() -> None:
    message = message_of(remat__policy="offload")
    assert message.startswith("remat.policy: given 'offload', expected nothing in host memory")
    assert "remat=scan_offload" in message


def test_missing_required_value_is_named() -> None:
    tree = with_values()
    del tree["task"]["global_batch_size"]
    with pytest.raises(ConfigError, match=r"task\.global_batch_size: given nothing"):
        load_config(tree)


@pytest.mark.parametrize("text", ["1e-5", "1E-5", "+1e-5", "1.0e-5", ".1e-4"])
def test_float_without_a_dot_is_a_float(text: str) -> None:
    """YAML 1.1 reads 1e-5 as text."""
    assert load_config(with_values(task__optimizer__learning_rate=text)).task.optimizer == (
        load_config(with_values(task__optimizer__learning_rate=0.00001)).task.optimizer
    )
    scratch = with_values(model__architecture={"rms_norm_eps": text, "model_type": "llama"})
    assert load_config(scratch).model.architecture == {"rms_norm_eps": 1e-5, "model_type": "llama"}


def test_whole_number_is_a_float_where_one_is_wanted() -> None:
    value = load_config(with_values(task__max_grad_norm=1)).task.max_grad_norm
    assert value == 1.0 and isinstance(value, float)


@settings(deadline=None, max_examples=60)
@given(st.text(max_size=12), st.sampled_from(sorted(known_keys())))
def test_nothing_but_a_config_error_comes_out(value: str, key: str) -> None:
    try:
        config = load_config(with_values(**{key.replace(".", "__"): value}))
    except ConfigError as error:
        assert ": given " in str(error)
    else:
        assert isinstance(config, TrainConfig)


def test_schema_defaults_are_those_of_the_dataclasses() -> None:
    defaults = schema_defaults()
    assert defaults["task"]["name"] == defaults["task"]["global_batch_size"] == "???"
    filled = copy.deepcopy(defaults)
    for section, values in VALID.items():
        filled[section].update(values)
    assert load_config(filled) == load_config(VALID)


def test_nearest_prefers_the_same_last_part() -> None:
    keys = ["task.max_steps", "task.max_grad_norm", "seed"]
    assert nearest("optimizer.max_steps", keys) == "task.max_steps"
    assert nearest("sed", keys) == "seed"
    assert nearest("qqqqq", keys) is None


@pytest.mark.parametrize(
    ("key", "value"),
    [("file_dataset_path", "x.jsonl"), ("hf_dataset_name", "a/b"), ("max_examples", 3)],
)
def test_held_out_sources_stand_alone(key: str, value: object) -> None:
    given = {"eval__sources": [OWN, OTHER], "eval__split": "test", f"eval__{key}": value}
    assert f"eval.{key}: given" in message_of(**given)


def test_each_held_out_source_has_a_loss_as_metric() -> None:
    listed = load_config(with_values(eval__sources=[OWN, OTHER]))
    assert listed.holds_out
    assert listed.measured[-2:] == ["eval_loss[own]", "eval_loss[other]"]
    mixed = {"dataset__file_dataset_path": None, "dataset__hf_dataset_name": None}
    mixed["dataset__hf_dataset_config_name"] = None
    split = load_config(
        with_values(**mixed, dataset__mixture=[OWN, OTHER], dataset__eval_fraction=0.1)
    )
    assert split.measured == ["eval_loss", "eval_perplexity", "eval_loss[own]", "eval_loss[other]"]
    assert load_config(VALID).measured == ["eval_loss", "eval_perplexity"]
