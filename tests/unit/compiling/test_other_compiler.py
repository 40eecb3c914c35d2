"""Another version of the compiler: which environments are taken, and what is said of the others.

The environments are folders with a script in the place of Python, which answers with versions.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from torchprime.compiling.command import other_report
from torchprime.compiling.other_compiler import find_other, known_flags
from torchprime.compiling.side_by_side import describe_both
from torchprime.config.compose import compose_config
from torchprime.config.entry import run_main
from torchprime.errors import RuntimeSetupError
from torchprime.torch_xla_models.train import main

# What jax 0.12.0.1 says of itself, shortened.
REQUIRES = [
    "jaxlib<=0.12.0.1,>=0.11.2",
    'jaxlib==0.11.2; extra == "ci"',
    'libtpu==0.0.50.*; extra == "tpu"',
]
GOOD = {"jax": "0.12.0.1", "jaxlib": "0.12.0.1", "libtpu": "0.0.52", "requires": REQUIRES}


def environment(folder: Path, answer: str, code: int = 0) -> str:
    python = folder / "bin" / "python"
    python.parent.mkdir()
    python.write_text(f"#!/bin/sh\ncat <<'END'\n{answer}\nEND\nexit {code}\n")
    python.chmod(0o755)
    return str(folder)


def test_a_newer_libtpu_than_jaxs_own_is_taken(tmp_path) -> None:
    found = find_other(environment(tmp_path, json.dumps(GOOD)))
    assert (found.jax, found.libtpu) == ("0.12.0.1", "0.0.52")
    assert found.python == tmp_path / "bin" / "python"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"libtpu": None}, "expected an environment with jax and libtpu; libtpu is not installed"),
        (
            {"jax": None, "jaxlib": None, "requires": []},
            "jax and jaxlib are not installed there",
        ),
        ({"libtpu": "0.0.21"}, "expected libtpu of at least 0.0.50, .* it has 0.0.21"),
        ({"jaxlib": "0.13.0"}, "expected jaxlib of at most 0.12.0.1, .* it has 0.13.0"),
        ({"jaxlib": "0.10.2"}, "expected jaxlib of at least 0.11.2, .* it has 0.10.2"),
        (
            {"jax": "0.6.0", "jaxlib": "0.6.0", "requires": []},
            "expected jax 0.7.1 or newer, .*0.6.0",
        ),
    ],
)
def test_what_does_not_fit(tmp_path, change, said) -> None:
    given = environment(tmp_path, json.dumps(GOOD | change))
    with pytest.raises(RuntimeSetupError, match=f"(?s)^compile_libtpu: .*{said}.*make libtpu-new"):
        find_other(given)


def test_a_failing_process_leaves_the_first_report(tmp_path) -> None:
    """Its message takes the place of its figures."""
    folder = environment(tmp_path, json.dumps(GOOD))
    python = Path(folder) / "bin" / "python"
    python.write_text(
        python.read_text().replace("cat", '[ "$2" = -c ] || { echo no; exit 3; }; cat')
    )
    config = compose_config(["model.pretrained_model=x", "task.max_steps=1", "compile_only=v6e-1"])
    compiler: Any = SimpleNamespace(spmd=True, other_environment=lambda config: {})
    other, sizes = find_other(folder), cast(Any, None)
    found = other_report(config, compiler, sizes, other, tmp_path / "module", tmp_path)
    assert not found["fits"]
    text = "\n".join(describe_both({"versions": {"libtpu": "0.0.21", "jax": "0.7.1"}}, found))
    assert "libtpu 0.0.52 says:\n  The compiler's process ended with exit code 3" in text
    assert text.endswith("    no")


def test_a_python_that_does_not_run(tmp_path) -> None:
    with pytest.raises(RuntimeSetupError, match=r"compile_libtpu: .*python does not run"):
        find_other(environment(tmp_path, "", code=1))


@pytest.mark.parametrize("given", ["nowhere", "file"])
def test_a_wrong_path_in_one_line(tmp_path, capsys, given) -> None:
    (tmp_path / "file").touch()
    argv = ["--config-name", "quickstart", "mesh=fsdp4", "compile_only=v6e-4"]
    argv += [f"compile_libtpu={tmp_path / given}", f"output_dir={tmp_path / 'out'}"]
    assert run_main(main, argv) == 2
    said = capsys.readouterr().err
    assert "expected the folder of a Python environment" in said and "make libtpu-new" in said
    assert "Traceback" not in said and not (tmp_path / "out").exists()


def test_without_a_slice_it_is_refused(capsys) -> None:
    assert run_main(main, ["--config-name", "quickstart", "compile_libtpu=somewhere"]) == 2
    assert "Set compile_only=v6e-8 too." in capsys.readouterr().err


def test_flags_that_newer_versions_refuse_are_left_out() -> None:
    assert known_flags("--mine=1 --xla_tpu_enable_flash_attention=false --a=b") == "--mine=1 --a=b"
