"""Text from a stranger's file is never a program: no template outside the sandbox, no shell, no
format string, no pickle or code of theirs, no file written through a link."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
PACKAGE = REPO / "torchprime"
# The one place of its kind each: (file, what is called).
ALLOWED = {
    ("checkpoint/run/dcp_metadata.py", "pickle"),  # a reader with a few operations and classes
    ("checkpoint/run/shards.py", "pickle"),  # writes
    ("torch_xla_models/processes.py", "pickle"),  # between processes of one run
    ("text/terminal.py", "sys.stdout.write"),
    ("text/terminal.py", "sys.stderr.write"),
    ("cli/resume_check.py", "symlink_to"),  # in a temporary folder
    ("data/blocks/store.py", "OSFile"),  # in a folder that is being prepared
    ("data/rows/exchanges.py", "frame.format"),  # constants of that module
    ("data/shared/fields.py", "missing.format"),  # reasons of ours, given by callers
    ("data/shared/fields.py", "wrong.format"),
    ("metrics/trackers/tracker.py", "import_module"),  # of trackers, by names of ours
    ("torch_native/attention.py", "import_module"),  # of kernels, by names of ours
    ("torch_native/fused_loss.py", "import_module"),
    ("evaluation/graders/custom.py", "import_module"),  # a module that the user's config names
}
UNSANDBOXED = {"Environment", "Template", "NativeEnvironment", "SandboxedEnvironment"}
CODE = {"eval", "exec", "compile", "__import__"}
RAW_OUTPUT = {f"sys.{name}.write" for name in ("stdout", "stderr", "__stdout__", "__stderr__")}
SHELLS = {"os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput"}
WRITES = {"write_text", "touch", "symlink_to", "hardlink_to"}


def sources() -> list[Path]:
    """The package, and what else reads a stranger's models and rows."""
    scripts = ("vllm_tpu_deployment", "torchrun_gpu_sft")
    roots = (PACKAGE, *(REPO / "experimental" / name for name in scripts))
    return sorted(p for root in roots for p in root.rglob("*.py") if "assets" not in p.parts)


def dotted(node: ast.AST) -> str:
    """`a.b.c` of names and attributes, a `?` for what else there is."""
    if isinstance(node, ast.Name):
        return node.id
    return f"{dotted(node.value)}.{node.attr}" if isinstance(node, ast.Attribute) else "?"


def keyword(call: ast.Call, name: str) -> object:
    values = [each.value for each in call.keywords if each.arg == name]
    return values[0].value if values and isinstance(values[0], ast.Constant) else None


def found_in(text: str, ours: bool = True) -> Iterator[tuple[int, str, str]]:
    """(line, what, why) of everything that this file is about.

    Args:
        ours: of the package, which writes by torchprime/files/atomic.py alone.
    """
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("jinja2"):
            for name in {alias.name for alias in node.names} & UNSANDBOXED:
                yield node.lineno, name, "jinja2 outside of its immutable sandbox"
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = {alias.name for alias in node.names} | {getattr(node, "module", None) or ""}
            for name in names & {"pickle", "marshal", "shelve", "dill", "joblib"}:
                yield node.lineno, name, "a format that runs code when it is read"
        if isinstance(node, ast.Call):
            yield from _call(node, ours)
        if isinstance(node, ast.Name) and node.id == "print":
            yield node.lineno, "print", "printed as it is: see text/terminal.py"
        if isinstance(node, ast.Attribute) and dotted(node) in RAW_OUTPUT:
            yield node.lineno, dotted(node), "printed as it is: see text/terminal.py"


def _call(node: ast.Call, ours: bool) -> Iterator[tuple[int, str, str]]:
    name = dotted(node.func)
    last = name.rpartition(".")[2]
    if name.startswith("jinja2.") and last in UNSANDBOXED:
        yield node.lineno, last, "jinja2 outside of its immutable sandbox"
    if name in CODE or last == "import_module":
        yield node.lineno, last, "text that is run"
    if name == "argparse.ArgumentParser":
        yield (
            node.lineno,
            name,
            "it prints what it is given: see make_parser in cli/shared/arguments.py",
        )
    if name in SHELLS or keyword(node, "shell") is True:
        yield node.lineno, name, "a shell"
    if name == "yaml.load" or name == "torch.load" and keyword(node, "weights_only") is not True:
        yield node.lineno, name, "a reader that runs code"
    is_library = last == "from_pretrained" and name.startswith("Auto")
    if is_library and keyword(node, "trust_remote_code") is not False:
        yield node.lineno, name, "code beside a model is run without trust_remote_code=False"
    if last == "format" and isinstance(node.func, ast.Attribute):
        value = node.func.value
        value = value.value if isinstance(value, ast.Subscript) else value
        if not isinstance(value, ast.Constant) and not dotted(value).rpartition(".")[2].isupper():
            yield node.lineno, name, "a format string that is no constant"
    mode = node.args[1] if name == "open" and len(node.args) > 1 else None
    mode = node.args[0] if last == "open" and name != "open" and node.args else mode
    writes = isinstance(mode, ast.Constant) and str(mode.value)[:1] in ("w", "a", "x")
    if ours and (last in WRITES or last == "OSFile" or writes) and name not in ("write_text",):
        yield (
            node.lineno,
            last,
            "a file written by its path, through a link: see files/atomic.py",
        )


def test_text_of_strangers_is_never_a_program() -> None:
    wrong, used = [], set()
    for path in sources():
        ours = PACKAGE in path.parents
        name = path.relative_to(PACKAGE if ours else REPO).as_posix()
        if name == "files/atomic.py":
            continue
        for line, what, why in found_in(path.read_text(), ours):
            used.add((name, what))
            if (name, what) not in ALLOWED:
                wrong.append(f"{name}:{line}: {what}: {why}")
    assert not wrong, "\n".join(wrong)
    assert not ALLOWED - used, "exceptions that nothing needs any more"


@pytest.mark.parametrize(
    "text",
    [
        "import jinja2\njinja2.Environment(autoescape=True)",
        "from jinja2 import Template",
        "from jinja2.sandbox import SandboxedEnvironment",
        "import subprocess\nsubprocess.run(x, shell=True)",
        "import os\nos.system(x)",
        "eval(x)",
        "row['text'].format(1)",
        "text.format(name=1)",
        "torch.load(x)",
        "torch.load(x, weights_only=False)",
        "yaml.load(x)",
        "from pickle import loads",
        "AutoTokenizer.from_pretrained(folder)",
        "AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)",
        "path.write_text('x')",
        "open(path, 'w')",
        "path.open('ab')",
        "print(x)",
        "say = partial(print, flush=True)",
        "sys.stderr.write(x)",
        "argparse.ArgumentParser()",
    ],
)
def test_each_is_found(text: str) -> None:
    assert list(found_in(text))


@pytest.mark.parametrize(
    "text",
    [
        "from jinja2.sandbox import ImmutableSandboxedEnvironment",
        "subprocess.run([x])",
        "'{}'.format(x)",
        "REASON.format(x)",
        "FRAMES[0].format(x)",
        "torch.load(x, weights_only=True)",
        "AutoTokenizer.from_pretrained(folder, trust_remote_code=False)",
        "open(path)",
        "path.open('rb')",
        "write_text(path, 'x')",
        "re.compile(x)",
        "say(x)",
        "sys.stdout.isatty()",
    ],
)
def test_what_is_harmless_is_let_through(text: str) -> None:
    assert not list(found_in(text))
