"""Every YAML file we ship composes, passes the schema and says what it is."""

from __future__ import annotations

import functools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from torchprime.config.compose import assets_dir, compose_config, configs_dir
from torchprime.config.load import schema_defaults
from torchprime.config.sections.evaluation import LOSSES
from torchprime.data.leaks.find import find_leaks
from torchprime.evaluation.graders.samples import Sample
from torchprime.models.architecture import architecture_from_hf
from torchprime.models.decoder import CausalLM
from torchprime.sharding import ShardingTable
from torchprime.training.evaluating import make_choosing, make_graders

CONFIGS = configs_dir()
GROUPS = ("adapter", "dataset", "eval", "mesh", "model", "remat", "sharding", "task")
RUNS = sorted(path.stem for path in CONFIGS.glob("*.yaml"))
OPTIONS = sorted(
    (group, path.stem) for group in GROUPS for path in (CONFIGS / group).glob("*.yaml")
)
# Values that `default` and some options leave to the user.
GIVEN = ["model.pretrained_model=some/checkpoint", "task.max_steps=10"]
NEEDED = {
    ("dataset", "file"): ["dataset.file_dataset_path=rows.jsonl"],
    ("eval", "file"): ["eval.file_dataset_path=rows.jsonl"],
}

# Parameter counts as published on the models' cards (tied embeddings counted once).
PUBLISHED_PARAMETERS = {
    "gemma2-2b": 2_614_341_888,
    "gemma3-1b": 999_885_952,
    "gemma3-4b": 3_880_263_168,
    "olmo2-7b": 7_298_617_344,
    "olmo3-7b": 7_298_011_136,
    "llama-3-8b": 8_030_261_248,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.2-1b": 1_235_814_400,
    "qwen2.5-math-1.5b": 1_543_714_304,
    "qwen3-0.6b": 596_049_920,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "phi-4": 14_659_507_200,
    "phi-4-mini": 3_836_021_760,
    "smollm3-3b": 3_075_098_624,
    "granite-3.3-8b": 8_170_864_640,
    "glm-4-9b": 9_400_279_040,
    "mistral-small-24b": 23_572_403_200,
    "ministral3-3b": 3_429_006_336,
    "ministral3-8b": 8_489_553_920,
    "ministral3-14b": 13_506_073_600,
}


def architecture_of(model: str) -> dict[str, Any]:
    return yaml.safe_load((CONFIGS / "model" / f"{model}.yaml").read_text())["architecture"]


@functools.cache
def shapes_of(model: str, *switches: str) -> dict[str, tuple[int, ...]]:
    """Parameter shapes of a named model, with some of its config's switches turned on."""
    architecture = {**architecture_of(model), **dict.fromkeys(switches, True)}
    with torch.device("meta"):
        built = CausalLM(architecture_from_hf(architecture))
    return {name: tuple(value.shape) for name, value in built.named_parameters()}


def test_there_are_no_other_groups() -> None:
    assert {path.name for path in CONFIGS.iterdir() if path.is_dir()} == set(GROUPS)


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Every value of a tree by its dotted key."""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        key = f"{prefix}{name}"
        found |= flat(value, f"{key}.") if isinstance(value, dict) and value else {key: value}
    return found


def values_in(path: Path) -> dict[str, Any]:
    """The values that a file of configs/ sets itself, by the full key."""
    tree = yaml.safe_load(path.read_text()) or {}
    tree.pop("defaults", None)
    everywhere = path.parent == CONFIGS or "@package _global_" in path.read_text()
    return flat(tree, "" if everywhere else f"{path.parent.name}.")


def values_beneath(path: Path) -> dict[str, Any]:
    """The values set by the files in a file's list `defaults`; its own values go over them."""
    found: dict[str, Any] = {}
    for entry in (yaml.safe_load(path.read_text()) or {}).get("defaults", []):
        if isinstance(entry, dict):
            ((group, option),) = entry.items()
            file = CONFIGS / group.removeprefix("override /") / f"{option}.yaml"
        elif entry in ("_self_", "torchprime_schema"):
            continue
        else:
            file = path.parent / f"{entry}.yaml"
        found |= values_beneath(file) | values_in(file)
    return found


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda path: path.stem)
def test_defaults_stand_in_the_schema_alone(path: Path) -> None:
    defaults, set_here = flat(schema_defaults()), values_in(path)
    if path.name == "default.yaml" and path.parent == CONFIGS:
        shown = {key: defaults[key] for key in set_here}
        assert set_here == shown, "default.yaml shows the schema's defaults"
        return
    beneath = values_beneath(path)
    restated = [
        key
        for key, value in set_here.items()
        if key in defaults and value == defaults[key] == beneath.get(key, value)
    ]
    assert not restated, f"{path}: without these lines the values are the same"


@pytest.mark.parametrize("run", RUNS)
def test_run_composes(run: str) -> None:
    config = compose_config(["--config-name", run, *(GIVEN if run == "default" else [])])
    assert config.run_name == run


@pytest.mark.parametrize("run", RUNS)
def test_run_takes_the_overrides_users_give(run: str) -> None:
    overrides = ["model.pretrained_model=my/checkpoint", "task.max_steps=100", "mesh=single"]
    overrides += ["ici_mesh.fsdp=4", "task.optimizer.learning_rate=1e-5", "logging_steps=1"]
    config = compose_config(["--config-name", run, *overrides])
    assert config.mesh_shape() == {"data": 1, "fsdp": 4, "expert": 1, "context": 1, "tensor": 1}
    assert (config.task.max_steps, config.task.optimizer.learning_rate) == (100, 1e-5)


@pytest.mark.parametrize("run", RUNS)
def test_run_has_a_header(run: str) -> None:
    lines = (CONFIGS / f"{run}.yaml").read_text().splitlines()
    header = [line[1:].strip() for line in lines[: lines.index("")]]
    assert header[0] and all(line.startswith("#") for line in lines[: lines.index("")])
    for word in ("Command:", "Hardware:", "Time:", "Expected:"):
        said = [line.removeprefix(word).strip() for line in header if line.startswith(word)]
        assert len(said) == 1 and said[0], f"{run}.yaml: the header lacks '{word} ...'"
    command = next(line for line in header if line.startswith("Command:"))
    assert run == "default" or run in command or ".sh" in command


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_option_composes(group: str, option: str) -> None:
    compose_config([f"{group}={option}", *GIVEN, *NEEDED.get((group, option), [])])


@pytest.mark.parametrize("model", sorted(PUBLISHED_PARAMETERS))
def test_named_model_has_its_published_size(model: str) -> None:
    shapes = shapes_of(model)
    assert (
        sum(torch.Size(shape).numel() for shape in shapes.values()) == PUBLISHED_PARAMETERS[model]
    )


def test_every_named_architecture_has_a_published_size() -> None:
    with_architecture = {
        path.stem
        for path in (CONFIGS / "model").glob("*.yaml")
        if "architecture" in (yaml.safe_load(path.read_text()) or {})
    }
    assert with_architecture == set(PUBLISHED_PARAMETERS)


@pytest.mark.parametrize(
    ("model", "theta", "eps", "max_position", "tied"),
    [
        ("llama-3-8b", 500_000, 1e-5, 8192, False),
        ("llama-3.1-8b", 500_000, 1e-5, 131072, False),
        ("llama-3.1-70b", 500_000, 1e-5, 131072, False),
        ("llama-3.2-1b", 500_000, 1e-5, 131072, True),
        ("qwen2.5-math-1.5b", 10_000, 1e-6, 4096, True),
        ("qwen3-0.6b", 1_000_000, 1e-6, 40960, True),
        ("qwen3-8b", 1_000_000, 1e-6, 40960, False),
        ("qwen3-14b", 1_000_000, 1e-6, 40960, False),
        ("phi-4", 250_000, 1e-5, 16384, False),
        ("phi-4-mini", 10_000, 1e-5, 131_072, True),
        ("smollm3-3b", 5_000_000, 1e-6, 65536, True),
        ("granite-3.3-8b", 10_000_000, 1e-5, 131_072, True),
        ("glm-4-9b", 10_000, 1e-5, 32768, False),
        ("mistral-small-24b", 100_000_000, 1e-5, 32768, False),
        ("gemma2-2b", 10_000, 1e-6, 8192, True),
        ("gemma3-1b", 1_000_000, 1e-6, 32768, True),
        ("olmo2-7b", 500_000, 1e-6, 4096, False),
        ("ministral3-3b", 1_000_000, 1e-5, 262_144, True),
        ("ministral3-8b", 1_000_000, 1e-5, 262_144, False),
        ("ministral3-14b", 1_000_000_000, 1e-5, 262_144, False),
    ],
)
def test_named_model_has_its_published_numbers(
    model: str, theta: float, eps: float, max_position: int, tied: bool
) -> None:
    found = architecture_from_hf(architecture_of(model))
    assert (found.ropes[0].theta, found.rms_norm_eps) == (theta, eps)
    assert (found.max_position_embeddings, found.tie_word_embeddings) == (max_position, tied)
    factor = {"llama-3.1-8b": 8.0, "llama-3.1-70b": 8.0, "llama-3.2-1b": 32.0}.get(model)
    kind = {"phi-4-mini": "longrope"}.get(model, "llama3" if factor else "default")
    kind = "yarn" if model.startswith("ministral3") else kind
    assert found.ropes[0].kind == kind
    if factor:
        assert found.ropes[0].factor == factor and found.ropes[0].original_max_position == 8192


@pytest.mark.parametrize("model", sorted(PUBLISHED_PARAMETERS))
def test_named_model_says_which_file_it_was_compared_with(model: str) -> None:
    lines = (CONFIGS / "model" / f"{model}.yaml").read_text().splitlines()
    assert lines[2].startswith(("# Compared with: ", "# Not compared with the published file."))


@pytest.mark.parametrize("mesh", ["single", "fsdp8", "fsdp2_tensor2", "two_slices_fsdp8"])
def test_default_sharding_covers_every_family(mesh: str) -> None:
    config = compose_config([f"mesh={mesh}", *GIVEN])
    table = ShardingTable(
        config.sharding.parameters,
        config.sharding.activations,
        config.sharding.max_unsharded_params,
    )
    for model in (
        *("llama-3.2-1b", "llama-3.1-8b", "qwen2.5-math-1.5b", "qwen3-8b", "phi-4", "gemma3-1b"),
        *("olmo2-7b", "glm-4-9b", "mistral-small-24b", "ministral3-3b"),
    ):
        shapes = shapes_of(model)
        assert set(table.parameter_specs(shapes, config.mesh_shape())) == set(shapes)
    assert table.batch_axes() == ("data", "fsdp")


def test_default_sharding_covers_biases_everywhere() -> None:
    config = compose_config(["mesh=fsdp2_tensor2", *GIVEN])
    table = ShardingTable(config.sharding.parameters, config.sharding.activations)
    shapes = shapes_of("llama-3.2-1b", "attention_bias", "mlp_bias")
    assert any(name.endswith("down_proj.bias") for name in shapes)
    table.parameter_specs(shapes, config.mesh_shape())


def test_quickstart_assets_are_where_the_configs_say() -> None:
    config = compose_config(["--config-name", "quickstart"])
    for path in (config.dataset.file_dataset_path, config.eval.file_dataset_path):
        assert path and Path(path).is_file()
    assert Path(str(config.model.pretrained_model), "config.json").is_file()


@pytest.mark.parametrize("run", RUNS)
def test_what_a_run_grades_and_chooses_by_exists(run: str) -> None:
    config = compose_config(["--config-name", run, *(GIVEN if run == "default" else [])])
    assert set(make_graders(config.eval)) == set(config.eval.metrics) - {*LOSSES}
    make_choosing(config)
    if config.eval.graders and config.task.name == "sft":
        assert config.export.which == "best" and config.selection.gates


def pirate_rows(name: str) -> list[dict[str, str]]:
    text = (assets_dir() / "pirate" / f"{name}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def test_pirate_rows_are_many_and_no_prompt_is_twice() -> None:
    train, test = pirate_rows("train"), pirate_rows("test")
    assert len(train) >= 220 and len(test) >= 40
    texts = [(f"{row['prompt']}", row["prompt"], None) for row in [*train, *test]]
    found = find_leaks(texts[: len(train)], texts[len(train) :], threshold=0.8, workers=1)
    assert not found.leaks and not found.exact_duplicate_rows and not found.near_duplicate_rows
    answers = [row["completion"] for row in [*train, *test]]
    assert len(set(answers)) == len(answers)
    # No template: few answers begin alike.
    begins = Counter(" ".join(answer.split()[:3]) for answer in answers)
    assert begins.most_common(1)[0][1] <= 5


def test_the_pirate_grader_knows_pirates_from_others() -> None:
    graders = make_graders(compose_config(["eval=pirate_graded", *GIVEN]).eval)

    def share(answers: list[str]) -> float:
        grade = graders["pirate"]
        samples = [Sample("row", "", answer, "", True, 1) for answer in answers]
        return sum(float(grade(sample) or 0) for sample in samples) / len(samples)

    rows = [*pirate_rows("train"), *pirate_rows("test")]
    assert share([row["completion"] for row in rows]) == 1.0
    assert share([row["prompt"] for row in rows]) == 0.0
    plain = assets_dir() / "quickstart" / "data" / "test.jsonl"
    assert share([json.loads(line)["answer"] for line in plain.open()]) == 0.0


def test_pretraining_makes_the_architecture_that_ships() -> None:
    shipped = json.loads((assets_dir() / "quickstart" / "base" / "config.json").read_text())
    made = compose_config(["--config-name", "quickstart-pretrain"]).model.architecture
    assert made is not None
    assert architecture_from_hf(made) == architecture_from_hf(shipped)
