"""The site of `make docs`: links lead to its own pages, and nothing comes from other hosts."""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from load_script import load_script

REPO = Path(__file__).resolve().parents[2]
HOOKS = REPO / "docs" / "website" / "hooks.py"


@pytest.fixture(scope="module")
def hooks() -> ModuleType:
    pytest.importorskip("mkdocs", reason="the extra docs is not installed")
    return load_script(HOOKS)


@pytest.mark.parametrize(
    ("page", "link", "wanted"),
    [
        ("README.md", "docs/data.md", "data.md"),
        ("README.md", "SECURITY.md", "SECURITY.md"),
        ("docs/data.md", "../SECURITY.md#on-a-shared-machine", "SECURITY.md#on-a-shared-machine"),
        ("docs/data.md", "../README.md", "index.md"),
        ("docs/data.md", "configuration.md", "configuration.md"),
        ("SECURITY.md", "docs/data.md#splits", "data.md#splits"),
        ("experimental/vllm_tpu_deployment/README.md", "../../docs/tpu.md", "../../tpu.md"),
        ("README.md", "https://example.com/docs/data.md", "https://example.com/docs/data.md"),
        ("README.md", "docs/nowhere.md", "docs/nowhere.md"),
    ],
)
def test_links_lead_to_pages_of_the_site(
    hooks: ModuleType, page: str, link: str, wanted: str
) -> None:
    assert hooks.with_links(f"see [it]({link}).", page) == f"see [it]({wanted})."


def test_code_keeps_its_links(hooks: ModuleType) -> None:
    text = "```text\n[a](docs/data.md)\n```\n"
    assert hooks.with_links(text, "README.md") == text


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ('<script defer src="https://cdn.example/x.js"></script>', ["https://cdn.example/x.js"]),
        ('<link rel="stylesheet" href="//fonts.example/css">', ["//fonts.example/css"]),
        ("src: url(https://fonts.example/a.woff2)", ["https://fonts.example/a.woff2"]),
        ('@import "http://example/a.css"', ["http://example/a.css"]),
        ('<img alt="x" src="figures/a.png"><script src=assets/a.js></script>', []),
        ('<a href="https://example.com">a link to click</a>', []),
        ("background: url(data:image/svg+xml;charset=utf-8,%3Csvg xmlns=%22)", []),
    ],
)
def test_loads_from_other_hosts_are_found(hooks: ModuleType, text: str, wanted: list[str]) -> None:
    assert hooks.external_loads(text) == wanted


def test_every_page_is_in_the_navigation() -> None:
    # The one tag of this file names a function of an extension.
    text = re.sub(r"!!python\S+", "", (REPO / "mkdocs.yml").read_text(encoding="utf-8"))
    parts = [part for part in yaml.safe_load(text)["nav"]]
    pages = [
        page
        for part in parts
        for value in part.values()
        for page in ([value] if isinstance(value, str) else [p for e in value for p in e.values()])
    ]
    assert len(pages) == len(set(pages))
    assert {path.name for path in (REPO / "docs").glob("*.md")} <= set(pages)


def test_every_public_module_is_in_the_reference(hooks: ModuleType) -> None:
    packages = hooks.packages()
    assert "torchprime.training.loop" in packages["torchprime.training"]
    assert "torchprime.errors" in packages["torchprime"]
    assert not [name for names in packages.values() for name in names if "._" in name]
