"""The pages "How do I add ...?": their code blocks run, at the places that they name.

A block's first line says where it belongs: `# FILE` or `# FILE, in REGISTRY`. It is executed in
that module as if it stood in the file, and taken out again after the test.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import re
import textwrap
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_origin

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
import yaml

from torchprime.config.sections.dataset import Format
from torchprime.config.sections.evaluation import EvalConfig, GenerateConfig
from torchprime.data.blocks.dataset import PackedDataset
from torchprime.data.files.record import Rejection
from torchprime.data.files.source import SourceSpec
from torchprime.data.rows.formats import FIELDS
from torchprime.data.rows.read import open_rows
from torchprime.data.rows.row import Row, RowReading
from torchprime.data.tokens.completions import Example
from torchprime.errors import ConfigError
from torchprime.evaluation.graders.make import make_grader
from torchprime.evaluation.graders.samples import Sample
from torchprime.metrics.throughput import Stopwatch
from torchprime.models.architecture import Architecture, architecture_from_hf
from torchprime.models.decoder import CausalLM, initial_tensor
from torchprime.sharding import ShardingTable
from torchprime.training.backend import Backend, StepOptions
from torchprime.training.loop import BaseHook, CompileGuard, DataOrder, RunControl, TrainLoop
from torchprime.training.optim.adamw import AdamW

REPO = Path(__file__).resolve().parents[2]
GRADER, ROWS, MODEL, BACKEND = (
    f"docs/add-a-{what}.md" for what in ("grader", "row-format", "model", "backend")
)
FENCE = re.compile(r"^( *)```(\w+)\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
PLACE = re.compile(r"# ([\w/.]+\.py)(?:, in (\w+))?\n")


class Block(NamedTuple):
    file: str
    registry: str | None
    code: str


def fenced(page: str, language: str) -> list[str]:
    found = FENCE.findall((REPO / page).read_text(encoding="utf-8"))
    return [textwrap.dedent(body) for _, name, body in found if name == language]


def python_blocks(page: str) -> list[Block]:
    found = []
    for code in fenced(page, "python"):
        place = PLACE.match(code)
        assert place, f"{page}: the first line of a block says where it belongs:\n{code}"
        found.append(Block(place[1], place[2], code))
    return found


def block_of(page: str, file: str, registry: str | None = None) -> str:
    return next(b.code for b in python_blocks(page) if (b.file, b.registry) == (file, registry))


def module_of(file: str) -> types.ModuleType:
    return importlib.import_module(file.removesuffix(".py").replace("/", "."))


def defined(code: str) -> list[str]:
    """The names that a block gives to its module."""
    names: list[str] = []
    for node in ast.parse(code).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.append(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names += [alias.asname or alias.name for alias in node.names]
    return names


@pytest.fixture
def follow(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Does what a page says, in the modules that it names."""

    def follow_page(page: str) -> None:
        new: dict[str, Any] = {}
        for file, registry, code in python_blocks(page):
            if not (file.startswith("torchprime/") and (REPO / file).is_file()):
                continue
            module = module_of(file)
            if registry is None:
                for name in defined(code):
                    old = getattr(module, name, None)
                    monkeypatch.setattr(module, name, old, raising=False)  # restores it at the end
                exec(compile(code, file, "exec", dont_inherit=True), vars(module))
                new |= {name: getattr(module, name) for name in defined(code)}
                continue
            known = getattr(module, registry)
            if get_origin(known) is Literal:  # a type cannot grow while the program runs
                assert not set(ast.literal_eval(f"[{code}]")) & set(get_args(known))
                continue
            for key, value in eval(f"{{{code}}}", {**vars(module), **new}).items():
                assert key not in known
                monkeypatch.setitem(known, key, value)

    return follow_page


# Graders ------------------------------------------------------------------------------------------


def graders_of(text: str) -> dict[str, Callable[[Sample], float | None]]:
    """The graders of a page's YAML, after the checks of the config."""
    section = yaml.safe_load(text)["eval"]
    config = EvalConfig(
        file_dataset_path="rows.jsonl",
        generate=GenerateConfig(**section["generate"]),
        graders=section["graders"],
    )
    found = {}
    for place, options in enumerate(config.graders):
        rest = {key: value for key, value in options.items() if key != "name"}
        found[options["name"]] = make_grader(key=f"eval.graders[{place}]", **rest)
    return found


def answer(output: str, reference: str = "Yes.") -> Sample:
    return Sample("r:1", "Is it?", output, reference, stopped=True, tokens=3)


def test_a_function_grades(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = block_of(GRADER, "my_graders.py")
    (tmp_path / "my_graders.py").write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    grade = graders_of(fenced(GRADER, "yaml")[0])["yes_or_no"]
    assert grade(answer("No, never.")) == 1
    assert grade(answer("Perhaps")) == 0
    assert grade(answer("Yes", reference=" ")) is None


def test_a_kind_of_grader_grades(follow: Callable[[str], None]) -> None:
    text = fenced(GRADER, "yaml")[1]
    with pytest.raises(ConfigError, match="starts_with"):
        graders_of(text)
    follow(GRADER)
    grade = graders_of(text)["yes_or_no"]
    assert [grade(answer(output)) for output in (" yes, it is", "Maybe yes")] == [1, 0]
    with pytest.raises(ConfigError, match=r"graders\[0\]\.words: given \[\], expected at least"):
        make_grader("starts_with", key="eval.graders[0]", words=[])
    with pytest.raises(ConfigError, match="words"):
        make_grader("starts_with", key="eval.graders[0]")


# Rows ---------------------------------------------------------------------------------------------


def test_a_row_format_is_read(follow: Callable[[str], None], tmp_path: Path) -> None:
    assert get_args(Format) == ("auto", *FIELDS), "the list that the page extends"
    follow(ROWS)
    record = json.loads(fenced(ROWS, "json")[0])
    rows = [record, {**record, "label": 3}, {**record, "choices": "4"}, {**record, "note": "x"}]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    decision, read = open_rows(SourceSpec(file_dataset_path=str(path)), RowReading())
    right, no_choice, no_list, noted = read
    assert decision.kind == "multiple_choice"
    assert isinstance(right, Row) and right.kind == "multiple_choice"
    assert right.prompt == "Which is a prime?\nA. 4\nB. 7\nC. 9\nAnswer:"
    assert right.completion == " B"
    assert isinstance(no_choice, Rejection) and no_choice.detail == "there is no choice 3"
    assert isinstance(no_list, Rejection) and no_list.reason == "field choices is not a list"
    assert isinstance(noted, Row) and list(decision.unused) == ["note"]


# Models -------------------------------------------------------------------------------------------


def test_a_family_computes_what_transformers_computes(follow: Callable[[str], None]) -> None:
    entry = block_of(MODEL, "tests/parity/test_transformers_models.py", "CONFIGS")
    small: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2}
    small |= {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    names = {"SMALL": small, "SeedOssConfig": transformers.SeedOssConfig}
    (config,) = eval(f"{{{entry}}}", names).values()
    follow(MODEL)
    torch.manual_seed(0)
    reference = transformers.AutoModelForCausalLM.from_config(config).eval()
    for weight in reference.parameters():
        weight.data.normal_(0.0, 0.15)  # biases too, which begin as zeros
    ours = CausalLM(architecture_from_hf(config.to_dict()))
    ours.load_state_dict({n: p.detach() for n, p in reference.named_parameters()})
    assert ours.get_submodule("model.layers.0.self_attn.q_proj").bias is not None
    assert ours.get_submodule("model.layers.0.self_attn.o_proj").bias is None
    ids = torch.randint(0, 61, (2, 20))
    with torch.no_grad():
        wanted = reference(input_ids=ids).logits
        found = ours.logits(ids, torch.arange(20).expand(2, -1), torch.ones_like(ids))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


# Backends -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def backend_class() -> type[Any]:
    """The page's class, from all of its blocks as one file."""
    code = "\n".join(block.code for block in python_blocks(BACKEND))
    module = types.ModuleType("eager_backend")
    exec(compile(code, BACKEND, "exec", dont_inherit=True), vars(module))
    return module.EagerBackend


def methods(cls: type[Any]) -> dict[str, Any]:
    found = inspect.getmembers(cls, inspect.isfunction)
    return {name: each for name, each in found if not name.startswith("_")}


def test_a_backend_has_the_methods_of_the_protocol(backend_class: type[Any]) -> None:
    wanted, found = methods(Backend), methods(backend_class)
    assert set(found) < set(wanted)
    for name, method in found.items():
        given = list(inspect.signature(method).parameters)
        assert given == list(inspect.signature(wanted[name]).parameters), name
    backend = backend_class()
    assert not [a for a in typing.get_type_hints(Backend) if not hasattr(backend, a)]
    body = (REPO / BACKEND).read_text(encoding="utf-8").split("| Method | For |", 1)[1]
    table = [line.split("|")[1] for line in body.split("\n\n", 1)[0].splitlines()[2:]]
    assert set(re.findall(r"`(\w+)`", "".join(table))) == set(wanted) - set(found)


def example(number: int) -> Example:
    ids = np.arange(number, number + 5, dtype=np.int32)
    rules = np.full(5, 5, dtype=np.uint8)
    return Example(f"r:{number}", ids, np.ones(5, dtype=np.float32), rules, "joint")


def tiny() -> Architecture:
    config = {"model_type": "llama", "vocab_size": 29, "hidden_size": 16, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 24}
    return architecture_from_hf({**config, **heads})


def test_a_backend_trains_two_steps_in_the_loop(backend_class: type[Any]) -> None:
    """Its loss and weights are those of torch.optim on the same batches."""
    reference = CausalLM(tiny())
    with torch.no_grad():
        for name, weight in reference.named_parameters():
            weight.copy_(initial_tensor(name, weight.shape, 0.02, seed=1))
    with torch.device("meta"):
        model = CausalLM(tiny())
    backend = backend_class()
    values = {name: p.detach().clone() for name, p in reference.named_parameters()}
    backend.place(model, ShardingTable({}, {}), values.__getitem__, torch.float32)
    backend.prepare_training(AdamW(), StepOptions(gradient_accumulation_steps=2, loss_chunks=2))
    data = PackedDataset.from_examples(
        [example(n) for n in range(9)], block_size=8, pad_id=0, packing="none"
    )
    order, losses = DataOrder(data, seed=0, global_batch_size=4), []

    class Keep(BaseHook):
        def on_record(self, record: Any) -> None:
            losses.append(record.loss)

    TrainLoop(
        backend=backend,
        order=order,
        accumulation=2,
        learning_rate=lambda step: 0.01,
        logging_steps=1,
        flops_per_token=1.0,
        hooks=[Keep()],
        control=RunControl(CompileGuard(backend, allow=False), Stopwatch()),
    ).run(range(2))

    optimizer = torch.optim.AdamW(reference.parameters(), lr=0.01, weight_decay=0.0)
    for step in range(2):
        batch = order.batch(step)
        fields = (batch.input_ids, batch.position_ids, batch.segment_ids)
        logits = reference.logits(*map(torch.from_numpy, fields))
        targets = torch.from_numpy(batch.targets).long().flatten()
        loss = F.cross_entropy(logits.flatten(0, 1), targets, ignore_index=-100)
        assert losses[step] == pytest.approx(loss.item(), rel=1e-5)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert backend.progress() == (2, 0)
    trained = dict(backend.weights())
    for name, weight in reference.named_parameters():
        torch.testing.assert_close(trained[name], weight.detach(), rtol=1e-4, atol=1e-5)
