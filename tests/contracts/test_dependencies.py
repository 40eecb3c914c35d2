"""Dependency direction: imports go down the layers only, and device libraries stay in backends."""

from __future__ import annotations

import ast
import importlib.metadata
import sys
from pathlib import Path

import pytest
from source_tree import PACKAGE, REPO, imported_names, sources

LEAVES = {
    *("data", "models", "adapters", "losses", "sharding"),
    *("checkpoint", "metrics", "compare", "attention_kernels"),
}
BACKENDS = {"torch_xla_models", "torch_native"}
BELOW_GENERATION = {"config", *LEAVES}
BELOW_EVALUATION = {*BELOW_GENERATION, "generation"}
BELOW_REPORT = {*BELOW_EVALUATION, "evaluation"}
BELOW_TRAINING = {*BELOW_REPORT, "report"}
BELOW_COMPILING = {*BELOW_TRAINING, "training"}
BELOW_BACKENDS = {*BELOW_COMPILING, "compiling", "sweep"}
# Modules and rooms below all others, in an order: each may import those before it.
BELOW = [
    *("errors", "installed", "text", "files"),
    *("host_memory", "raw_tokenizer", "counter_bits", "barriers"),
]
EVERYWHERE = set(BELOW)
# Other imports that each room may have.
ALLOWED: dict[str, set[str]] = {
    **{name: set(BELOW[:place]) for place, name in enumerate(BELOW)},
    "config": set(),
    **{leaf: {"config"} for leaf in LEAVES},
    "checkpoint": {"config", "models", "adapters"},
    "compare": {"config", "metrics"},
    "generation": BELOW_GENERATION,
    "evaluation": BELOW_EVALUATION,
    "report": BELOW_REPORT,
    "training": BELOW_TRAINING,
    "compiling": BELOW_COMPILING,
    "sweep": BELOW_TRAINING,
    **{backend: BELOW_BACKENDS for backend in BACKENDS},
    "cli": {*BELOW_BACKENDS, *BACKENDS},
}
LATE = "# late:"
TPU_ROOMS = {"torch_native/tpu", "torch_native/chips"}
# Rooms outside of the backends that use jax, for all of them.
JAX_ROOMS = {"attention_kernels", "compiling"}


def room_of(path: Path) -> str:
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def wrong_directions(path: Path, text: str) -> list[str]:
    here = room_of(path)
    if here == "__init__":
        return []
    wrong = [] if here in ALLOWED else [f"{path}: torchprime/{here} is in no layer"]
    for line, name in imported_names(ast.parse(text), path):
        parts = name.split(".")
        if parts[0] != "torchprime" or len(parts) < 2 or not _is_room(parts[1]):
            continue
        base = set() if here in EVERYWHERE else EVERYWHERE
        if parts[1] not in {here, *base, *ALLOWED.get(here, set())}:
            wrong.append(f"{path}:{line}: {here} imports {name}")
    return wrong


def _is_room(name: str) -> bool:
    return (PACKAGE / name).is_dir() or (PACKAGE / f"{name}.py").is_file() or name in ALLOWED


def wrong_devices(path: Path, text: str) -> list[str]:
    here, wrong = room_of(path), []
    tree = ast.parse(text)
    names = list(imported_names(tree, path))
    # torch.distributed is an attribute of torch even where it is never imported.
    names += [
        (node.lineno, f"torch.{node.attr}")
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == "torch"
        and node.attr == "distributed"
    ]
    for line, name in names:
        top = name.split(".")[0]
        # TorchTPU, whose step needs jax too, has rooms of its own.
        folder = path.relative_to(PACKAGE).parent.as_posix()
        in_tpu = folder in TPU_ROOMS and top in {"torch_tpu", "jax", "jaxlib", "libtpu"}
        xla_only = top in {"torch_xla", "jax", "jaxlib", "torchax", "libtpu"} and not in_tpu
        # Its checkpoint package is a file format, and that is all that checkpoint/ may use of it.
        file_format = here == "checkpoint" and name.startswith("torch.distributed.checkpoint.")
        collective = not file_format and f"{name}.".startswith("torch.distributed.")
        misplaced = top == "torch_tpu" and not in_tpu
        pure_jax = top in {"jax", "jaxlib"} and here in JAX_ROOMS
        misplaced |= xla_only and not pure_jax and here != "torch_xla_models"
        if misplaced or (collective and here not in BACKENDS):
            wrong.append(f"{path}:{line}: {here} uses {name}")
    return wrong


def late_imports(path: Path, text: str) -> list[str]:
    lines = text.splitlines()
    inside = {
        node
        for function in ast.walk(ast.parse(text))
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for node in ast.walk(function)
        if isinstance(node, ast.Import | ast.ImportFrom)
    }
    first_lines = {node.lineno for node in inside}
    wrong = []
    for number in sorted(first_lines):
        above = number - 2  # 0-based index of the line before; skip over a run of late imports
        while above >= 0 and above + 1 in first_lines:
            above -= 1
        comments = [lines[number - 1]]
        while above >= 0 and lines[above].lstrip().startswith("#"):
            comments.append(lines[above])
            above -= 1
        if not any(LATE in comment for comment in comments):
            wrong.append(f"{path}:{number}: {lines[number - 1].strip()}")
    return wrong


def test_imports_go_down_only() -> None:
    wrong = [each for path in sources() for each in wrong_directions(path, path.read_text())]
    assert not wrong, "\n".join(wrong)


def test_device_libraries_stay_in_the_backends() -> None:
    wrong = [each for path in sources() for each in wrong_devices(path, path.read_text())]
    assert not wrong, "\n".join(wrong)


def test_imports_inside_functions_say_why() -> None:
    wrong = [each for path in sources() for each in late_imports(path, path.read_text())]
    assert not wrong, f"move to the top, or say why in a comment '{LATE} ...':\n" + "\n".join(wrong)


@pytest.mark.parametrize(
    ("where", "text"),
    [
        ("config/x.py", "from torchprime.data import order"),
        ("data/x.py", "import torchprime.models.decoder"),
        ("data/x.py", "from ..training import loop"),
        ("models/x.py", "from torchprime import sharding"),
        ("metrics/x.py", "from torchprime.losses.cross_entropy import chunked"),
        ("training/x.py", "def f():\n    from torchprime.torch_xla_models import mesh"),
        ("torch_xla_models/x.py", "from torchprime.torch_native import mesh"),
        ("torch_native/x.py", "import torchprime.cli"),
        ("misc/x.py", "import json"),
        ("text/x.py", "from torchprime.files import atomic"),
        ("files/atomic.py", "from torchprime.config.schema import TrainConfig"),
    ],
)
def test_a_wrong_direction_is_found(where: str, text: str) -> None:
    assert wrong_directions(PACKAGE / where, text)


@pytest.mark.parametrize(
    ("where", "text"),
    [
        ("data/x.py", "from torchprime.config.schema import TrainConfig"),
        ("checkpoint/x.py", "from torchprime.models import decoder"),
        ("training/x.py", "from torchprime.evaluation import greedy"),
        ("torch_xla_models/x.py", "from torchprime.training.loop import Trainer"),
        ("config/x.py", "from torchprime import __version__\nfrom .schema import AXES"),
        ("data/x.py", "from torchprime.files.atomic import write_json"),
        ("files/atomic.py", "from torchprime.errors import CheckpointError"),
    ],
)
def test_a_right_direction_is_let_through(where: str, text: str) -> None:
    assert not wrong_directions(PACKAGE / where, text)


@pytest.mark.parametrize(
    ("where", "text", "count"),
    [
        ("training/x.py", "import torch_xla.core.xla_model as xm", 1),
        ("models/x.py", "from jax import numpy", 1),
        ("losses/x.py", "import torch\ntorch.distributed.all_reduce(1)", 1),
        ("checkpoint/x.py", "from torch import distributed", 1),
        ("checkpoint/x.py", "from torch.distributed.checkpoint.metadata import Metadata", 0),
        ("checkpoint/x.py", "import torch.distributed.checkpoint_like", 1),
        ("training/x.py", "import torch.distributed.checkpoint", 1),
        ("torch_xla_models/x.py", "import jax\nimport torch.distributed as dist", 0),
        ("torch_native/x.py", "import torch_xla", 1),
        ("torch_native/x.py", "import torch_tpu, jax", 2),
        ("torch_native/tpu/x.py", "import torch_tpu, jax", 0),
        ("torch_native/tpu/x.py", "import torch_xla", 1),
        ("torch_xla_models/x.py", "import torch_tpu", 1),
        ("attention_kernels/x.py", "import jax", 0),
        ("attention_kernels/x.py", "import torch_xla, libtpu", 2),
    ],
)
def test_a_device_library_is_found(where: str, text: str, count: int) -> None:
    assert len(wrong_devices(PACKAGE / where, text)) == count


def test_a_late_import_is_found_unless_it_says_why() -> None:
    plain = "def f():\n    import json\n"
    said = (
        "def f():\n    # late: takes a second, and\n    # few need it\n    import a\n    import b\n"
    )
    inline = "def f():\n    import json  # late: optional extra\n"
    assert late_imports(PACKAGE / "x.py", plain)
    assert not late_imports(PACKAGE / "x.py", said)
    assert not late_imports(PACKAGE / "x.py", inline)


def test_files_beside_train_py_shadow_no_library() -> None:
    """`python3 torchprime/torch_xla_models/train.py` puts that folder first on sys.path."""
    libraries = {*sys.stdlib_module_names, *importlib.metadata.packages_distributions()}
    shadowing = [
        str(path.relative_to(REPO))
        for backend in BACKENDS
        for path in (PACKAGE / backend).glob("*")
        if path.name != "__init__.py" and not path.name.startswith("__pycache__")
        if path.stem in libraries
    ]
    assert not shadowing, f"{shadowing}: named like a library; give another name"
