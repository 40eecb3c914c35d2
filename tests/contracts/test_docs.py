"""Check what the documentation says about keys, commands, files and folders."""

from __future__ import annotations

import dataclasses
import functools
import re
import shlex
import subprocess
import types
import typing
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import pytest
import yaml
from load_script import load_script

from torchprime import __version__
from torchprime.cli.main import CONFIG_COMMANDS, OTHER_COMMANDS
from torchprime.cli.train import take_flag
from torchprime.config.command_line import parse_command
from torchprime.config.compose import compose_config, configs_dir
from torchprime.config.load import free_sections, known_keys, schema_defaults
from torchprime.config.many_runs.jobs import read_multirun
from torchprime.config.schema import TrainConfig
from torchprime.training.backend import Backend

REPO = Path(__file__).resolve().parents[2]
PAGES = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md"] + sorted(
    path.relative_to(REPO).as_posix() for path in (REPO / "docs").glob("*.md")
)
TRAIN = ["torchprime train ", "python3 torchprime/torch_xla_models/train.py "]
# `key` | type | default | meaning
ROW = re.compile(r"\| `([a-z_][a-z0-9_.]*)` \| ([^|]+) \| ([^|]+) \| [^|]+ \|")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
INLINE_CODE = re.compile(r"`([^`\n]+)`")
OVERRIDE = re.compile(r"\+?([a-z_]+(?:\.[a-z0-9_]+)*)=(\S*)")
# A file of ours: with a folder in front, from the top or from torchprime/; maybe ::test_name.
OUR_FILE = re.compile(r"([\w.-]+(?:/[\w.-]+)+\.(?:py|yaml|md|sh))(?:::(\w+))?")


def text_of(page: str) -> str:
    return (REPO / page).read_text(encoding="utf-8")


def prose(page: str) -> str:
    """A page without its fenced blocks."""
    return FENCE.sub("", text_of(page))


def fenced(page: str, language: str) -> list[str]:
    return [body for name, body in FENCE.findall(text_of(page)) if name == language]


def command_lines(page: str) -> list[str]:
    """The lines of the page's bash blocks, continued ones joined."""
    joined = "\n".join(fenced(page, "bash")).replace("\\\n", " ")
    return [line.strip() for line in joined.splitlines() if line.strip()]


# The form of a page -------------------------------------------------------------------------------

DOCS = [page for page in PAGES if page.startswith("docs/")]
AUDIENCE = re.compile(r"For (users|operators|contributors): .*[^.]\.")
ITEM = re.compile(r"( *)(?:[-*]|\d+\.) ")
MOST_WORDS_OF_AN_ITEM = 60


def list_items(text: str) -> list[tuple[int, str]]:
    """Return (indentation, text) of each list item, without the items inside it."""
    found: list[tuple[int, str]] = []
    before, inside = "", False
    for line in FENCE.sub("", text).splitlines():
        match = ITEM.match(line)
        if match:
            found.append((len(match[1]), line[match.end() :]))
            inside = True
        elif line.strip():
            # After a blank line an item goes on with an indented paragraph only.
            inside = inside and (bool(before.strip()) or line.startswith(" "))
            if inside:
                indentation, said = found[-1]
                found[-1] = (indentation, f"{said} {line.strip()}")
        before = line
    return found


@pytest.mark.parametrize("page", DOCS)
def test_page_asks_one_question_and_names_its_readers(page: str) -> None:
    lines = text_of(page).splitlines()
    assert re.fullmatch(r"# .+\?", lines[0]), "the title is the question that the page answers"
    assert lines[1] == "" and AUDIENCE.fullmatch(lines[2]) and lines[3] == ""


@pytest.mark.parametrize("page", PAGES)
def test_lists_are_lists_on_the_site_too(page: str) -> None:
    """Python-Markdown wants a blank line before a list and four spaces before a nested one."""
    wrong, before = [], ""
    for line in prose(page).splitlines():
        item = ITEM.match(line)
        runs_on = before.strip() and not ITEM.match(before) and not before.startswith(" ")
        if item and (len(item[1]) % 4 or not item[1] and runs_on):
            wrong.append(line)
        if re.match(r" {1,3}(```|\|)", line):
            wrong.append(line)
        before = line
    assert not wrong


def test_items_of_the_architecture_are_short() -> None:
    items = list_items(text_of("docs/architecture.md"))
    assert len(items) > 10
    assert not [said for _, said in items if len(said.split()) > MOST_WORDS_OF_AN_ITEM]


def test_list_items_are_found() -> None:
    text = (
        "text\n\n- one\n  and more\n    - inside\n- two\n\n    still two\n\nno item\n\n1. three\n"
    )
    assert list_items(text + "\n```\n- code\n```\n") == [
        *((0, "one and more"), (4, "inside"), (0, "two still two"), (0, "three"))
    ]


def test_the_journey_is_drawn_by_its_script() -> None:
    script = REPO / "docs" / "figures" / "journey.py"
    journey = load_script(script)
    assert journey.drawing() == journey.FILE.read_text(encoding="utf-8"), f"run {script}"
    boxes = [*journey.BEFORE, *journey.DEVICE, *journey.AFTER]
    modules = {path for _, paths in boxes for path in paths.split(", ")}
    assert not [path for path in modules if not (REPO / "torchprime" / path).exists()]
    gates = {"put", "place", *journey.GATES_OUT.values()}
    assert not [gate for gate in gates if not hasattr(Backend, gate)]


# Keys --------------------------------------------------------------------------------------------


def documented_rows() -> dict[str, tuple[str, str]]:
    """(type, default) by key, from the tables of docs/configuration.md."""
    rows = ROW.findall(text_of("docs/configuration.md"))
    assert len(rows) == len({key for key, _, _ in rows}), "a key is documented twice"
    return {key: (kind.strip(), default.strip()) for key, kind, default in rows}


def schema_types(cls: Any = TrainConfig, prefix: str = "") -> dict[str, Any]:
    """The annotation of every key that is no section."""
    found: dict[str, Any] = {}
    for name, hint in typing.get_type_hints(cls, include_extras=True).items():
        if dataclasses.is_dataclass(hint):
            found |= schema_types(hint, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = hint
    return found


def described(hint: Any) -> str:
    """An annotation in the words of the tables."""
    if get_origin(hint) is Annotated:
        return get_args(hint)[1].words
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(described(each) for each in get_args(hint))
    if get_origin(hint) is Literal:
        return ", ".join(f"`{option}`" for option in get_args(hint))
    if get_origin(hint) is tuple:
        return f"{len(get_args(hint))} numbers"
    if get_origin(hint) is dict:
        return "mapping"
    if get_origin(hint) is list:
        (item,) = get_args(hint)
        if get_origin(item) is Literal:
            return f"list of {described(item)}"
        return {(str,): "list of texts", (int,): "list of whole numbers"}.get(
            get_args(hint), "list of sections"
        )
    words = {int: "whole number", float: "number", bool: "true or false", str: "text"}
    return {**words, type(None): "null"}[hint]


def default_of(key: str) -> Any:
    value: Any = schema_defaults()
    for part in key.split("."):
        value = value[part]
    return value


def test_every_key_is_documented_and_no_other() -> None:
    headings = re.findall(r"^#+ .*?`([a-z0-9_.]+)`", text_of("docs/configuration.md"), re.MULTILINE)
    assert sorted({*documented_rows(), *headings}) == sorted(known_keys())


@pytest.mark.parametrize(("key", "hint"), schema_types().items())
def test_type_and_default_are_the_schemas(key: str, hint: Any) -> None:
    kind, default = documented_rows()[key]
    assert kind == described(hint)
    wanted = default_of(key)
    if wanted == "???":
        assert default == "required"
        return
    written = yaml.safe_load(default.strip("`"))
    if isinstance(wanted, float):
        written = float(written)  # YAML 1.1 reads 1e-5 as text
    assert (type(written), written) == (type(wanted), wanted)


def test_every_option_of_every_group_is_named() -> None:
    text = text_of("docs/configuration.md")
    options = [path.relative_to(configs_dir()) for path in configs_dir().glob("*/*.yaml")]
    named = [f"`{path.parent.name}={path.stem}`" for path in options]
    assert len(named) > 20
    assert not [each for each in named if each not in text]


def override(word: str) -> tuple[str, str] | None:
    match = OVERRIDE.fullmatch(word)
    return match and (match[1], match[2])


@pytest.mark.parametrize("page", PAGES)
def test_overrides_in_the_text_exist(page: str) -> None:
    """`key=value` names a key of the schema; `group=option` an option, or a PLACEHOLDER."""
    groups = {path.name for path in configs_dir().iterdir() if path.is_dir()}
    wrong = []
    for code in INLINE_CODE.findall(prose(page)):
        for key, value in filter(None, map(override, code.split())):
            inside_free = any(key.startswith(f"{section}.") for section in free_sections())
            option = configs_dir() / key / f"{value}.yaml"
            known = option.is_file() or value.isupper() if key in groups else key in known_keys()
            if not known and not inside_free:
                wrong.append(f"{key}={value}")
    assert not wrong


# Commands ----------------------------------------------------------------------------------------


def test_readme_shows_commands() -> None:
    lines = command_lines("README.md")
    assert sum(line.startswith(TRAIN[0]) for line in lines) >= 2
    assert {"make quickstart", "make test"} <= {line.split("#")[0].strip() for line in lines}


@pytest.mark.parametrize("page", PAGES)
def test_commands_compose(page: str) -> None:
    for line in command_lines(page):
        if line.startswith(tuple(TRAIN)):
            _, argv = take_flag(shlex.split(line, comments=True)[2:])
            if "-m" in argv:  # Hydra's plugins are not installed here
                own = [word for word in argv if not word.startswith(("hydra.", "hydra/"))]
                read_multirun(parse_command(own))
                continue
            compose_config([word for word in argv if word not in ("--cfg", "job")])
        elif line.startswith("torchprime "):
            command, *argv = shlex.split(line, comments=True)[1:]
            assert command in OTHER_COMMANDS or compose_config(argv) and command in CONFIG_COMMANDS


def test_torchrun_commands_name_their_rendezvous() -> None:
    """Without it two jobs of one host meet on torchrun's default port."""
    sources = [REPO / page for page in PAGES]
    sources += [p for top in ("torchprime", "experimental") for p in (REPO / top).rglob("*.py")]
    commands = [
        command
        for path in sources
        for command in re.findall(r"torchrun\s+\"?\s*f?\"?--\S+", path.read_text(encoding="utf-8"))
    ]
    assert len(commands) >= 7
    assert not [c for c in commands if not re.search(r"--(standalone|nnodes)", c)]


@pytest.mark.parametrize("page", PAGES)
def test_make_targets_exist(page: str) -> None:
    code = [*INLINE_CODE.findall(prose(page)), *command_lines(page)]
    asked = {word.split()[1] for word in code if re.match(r"make [a-z]", word)}
    offered = set(re.findall(r"^([a-z0-9-]+):", text_of("Makefile"), re.MULTILINE))
    assert asked <= offered


# Files and folders -------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES)
def test_files_and_tests_in_the_text_exist(page: str) -> None:
    wrong = []
    for code in INLINE_CODE.findall(prose(page)):
        match = OUR_FILE.fullmatch(code)
        if match is None:
            continue
        name, test = match.groups()
        path = next((p for p in (REPO / name, REPO / "torchprime" / name) if p.is_file()), None)
        if path is None or (test and f"def {test}(" not in path.read_text(encoding="utf-8")):
            wrong.append(code)
    assert not wrong


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    targets = re.findall(r"\]\(([^)#]+)[^)]*\)", prose(page))
    inside = [target for target in targets if "://" not in target]
    assert not [target for target in inside if not ((REPO / page).parent / target).exists()]


def tree_folders() -> set[str]:
    """Folders in README's tree: two spaces of indentation per level, names that end in /, a gap."""
    block = next(body for body in fenced("README.md", "text") if "torchprime/" in body)
    folders, above = set(), []
    for line in block.splitlines():
        names = re.split(r" {2,}", line.strip())[0].split()
        above = above[: (len(line) - len(line.lstrip())) // 2]
        folders |= {"".join([*above, name]).rstrip("/") for name in names if name.endswith("/")}
        above = [*above, names[0]]
    return folders


@functools.cache
def repository_folders() -> frozenset[str]:
    """Folders of tracked files, and of those that would be with the next commit."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a git checkout")
    there = [Path(name) for name in done.stdout.splitlines() if (REPO / name).is_file()]
    parents = {parent.as_posix() for path in there for parent in path.parents}
    return frozenset(parents - {"."})


def test_readmes_tree_has_no_folder_that_is_not_there() -> None:
    assert not tree_folders() - repository_folders()


def test_readmes_tree_has_every_room() -> None:
    rooms = {folder for folder in repository_folders() if "/" not in folder}
    rooms |= {f for f in repository_folders() if re.fullmatch(r"torchprime/[^/]+", f)}
    assert not rooms - tree_folders()


def test_the_version_is_the_same_everywhere() -> None:
    newest = re.search(r"^## (\S+)", text_of("CHANGELOG.md"), re.MULTILINE)
    cited = re.search(r"^version: (\S+)$", text_of("CITATION.cff"), re.MULTILINE)
    assert newest and cited and newest[1] == cited[1] == __version__
