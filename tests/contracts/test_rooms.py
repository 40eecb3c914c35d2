"""Folders can be read in one sitting: few modules, rooms in an order, tests where one looks."""

from __future__ import annotations

import ast
import sys
from collections import Counter
from pathlib import Path

import pytest
from source_tree import PACKAGE, REPO, imported_names, sources

MOST_MODULES = 12
MOST_ARGUMENTS = 7  # of a function; more of them travel together as a dataclass
MOST_LINES = 450  # of a module
FEWER_LINES = {"checkpoint/run/storage.py": 350, "training/trainer.py": 350}
# The functions with more arguments, and why.
MANY_ARGUMENTS = {
    "torch_native/fused_loss.py: forward": (
        "torch hands the inputs of an autograd function over by position"
    ),
}
# The rooms of a folder, the lowest first: each may import those before it.
ROOMS = {
    "checkpoint": ["hf", "proof", "run", "adapter"],
    "cli": ["shared", "before", "weights", "answers", "sweeps"],
    "compare": ["logs"],
    "compiling": ["hlo"],
    "config": ["sections", "many_runs"],
    "data": [
        *("shared", "files", "messages", "rows", "tokenizer"),
        *("templates", "tokens", "blocks", "leaks"),
    ],
    "evaluation": ["graders"],
    "metrics": ["trackers"],
    "torch_native": ["tpu", "chips", "compile"],
    "torch_xla_models": ["layers", "compile", "splash"],
    "training": ["optim", "regularization", "setup", "advice", "run", "hooks", "inference"],
}
# Here rooms stand beside the modules that they use; elsewhere those are above all rooms.
MIXED = {"checkpoint", "config", "metrics", "torch_native", "torch_xla_models", "training"}
# Tests of several modules together, in tests/unit because they share its fixtures.
TOGETHER = {
    "checkpoint/test_s3_server.py",
    "compare/logs/test_peers.py",
    "test_forgetting_comparison.py",
    "test_gpu_benchmark.py",
    "test_maxtext_table.py",
    "test_quickstart_assets.py",
    "test_sampled_rows_study.py",
    "test_studies.py",
    "test_vllm_deployment.py",
    "torch_native/chips/test_variants.py",
    "torch_native/test_adapters.py",
    "torch_native/test_loss_variants.py",
    "torch_xla_models/test_adapters.py",
    "torch_xla_models/test_checkpoint.py",
    "torch_xla_models/test_collectives.py",
    "torch_native/tpu/test_isolation.py",
    "torch_xla_models/test_isolation.py",
    "torch_xla_models/test_long_loops.py",
    "torch_xla_models/test_loss_variants.py",
    "torch_xla_models/test_optimizers.py",
}


def modules() -> list[Path]:
    return [path for path in sources() if path.name != "__init__.py"]


def test_no_folder_has_more_than_a_dozen_modules() -> None:
    counts = Counter(path.parent for path in modules())
    assert not {folder: n for folder, n in counts.items() if n > MOST_MODULES}


def test_no_module_is_longer_than_one_reads_in_a_sitting() -> None:
    lengths = {each.relative_to(PACKAGE).as_posix(): lines_of(each) for each in modules()}
    assert not {name for name, n in lengths.items() if n > FEWER_LINES.get(name, MOST_LINES)}


def lines_of(path: Path) -> int:
    return len(path.read_text().splitlines())


def with_many_arguments(path: Path, text: str) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        names = [each.arg for each in given if each.arg not in ("self", "cls")]
        if len(names) > MOST_ARGUMENTS:
            found.add(f"{path.relative_to(PACKAGE).as_posix()}: {node.name}")
    return found


def test_no_function_has_many_arguments() -> None:
    found = set().union(*(with_many_arguments(path, path.read_text()) for path in sources()))
    wrong = found - MANY_ARGUMENTS.keys()
    assert not wrong, "group the arguments that travel together in a dataclass"
    assert MANY_ARGUMENTS.keys() <= found, "take it from MANY_ARGUMENTS: it has few now"


def test_many_arguments_are_found() -> None:
    path = PACKAGE / "x.py"
    seven = "def f(self, a, b, /, c, d, *, e, f, g): ..."
    eight = "async def f(a, b, /, c, d, *, e, f, g, h): ..."
    assert not with_many_arguments(path, seven)
    assert with_many_arguments(path, eight) == {"x.py: f"}


def test_no_module_is_named_like_one_of_the_standard_library() -> None:
    # In a folder of scripts such a name hides the library's own.
    named = [path for path in modules() if path.stem in sys.stdlib_module_names]
    assert not [str(path.relative_to(PACKAGE)) for path in named]


def room_of(parts: list[str]) -> str:
    """The room of a module `folder.room. ... .module`, "" for one beside the rooms."""
    return parts[1] if len(parts) > 2 else ""


def wrong_between_rooms(path: Path, text: str) -> list[str]:
    here = list(path.relative_to(PACKAGE).with_suffix("").parts)
    order, room, wrong = ROOMS.get(here[0], []), room_of(here), []
    if not room:
        return []
    if room not in order:
        return [f"{path}: {here[0]}/{room} has no place in the order"]
    for line, name in imported_names(ast.parse(text), path):
        parts = name.split(".")[1:]
        if not name.startswith(f"torchprime.{here[0]}.") or parts[1] == room:
            continue
        below = order[: order.index(room)]
        beside = parts[1] not in order
        if parts[1] not in below and not (beside and here[0] in MIXED):
            wrong.append(f"{path}:{line}: {here[0]}/{room} imports {name}")
    return wrong


def test_imports_between_rooms_go_down_only() -> None:
    wrong = [each for path in modules() for each in wrong_between_rooms(path, path.read_text())]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("file", "text", "is_wrong"),
    [
        ("data/files/x.py", "from torchprime.data.rows.row import Row", True),
        ("data/rows/x.py", "from torchprime.data.files.record import Record", False),
        ("data/rows/x.py", "from torchprime.data.prepare import Part", True),
        ("data/new/x.py", "", True),
        ("data/x.py", "from torchprime.data.leaks.find import find_leaks", False),
        ("training/run/x.py", "from torchprime.training.backend import Backend", False),
        ("training/setup/x.py", "from torchprime.training.run.saver import Saver", True),
        ("checkpoint/hf/x.py", "from torchprime.checkpoint.proof import verify", True),
    ],
)
def test_a_wrong_import_between_rooms_is_found(file: str, text: str, is_wrong: bool) -> None:
    assert bool(wrong_between_rooms(PACKAGE / file, text)) == is_wrong


def test_unit_tests_lie_where_their_module_does() -> None:
    unit = REPO / "tests" / "unit"
    for test in sorted(unit.rglob("test_*.py")):
        name = test.relative_to(unit)
        module = PACKAGE / name.with_name(name.name.removeprefix("test_"))
        if name.as_posix() in TOGETHER:
            continue
        assert module.is_file(), f"{name}: there is no {module.relative_to(PACKAGE)}"
    assert all((unit / name).is_file() for name in TOGETHER)
