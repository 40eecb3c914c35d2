"""Hooks of mkdocs: files from outside docs/, the API reference, and a check of the finished site.

README.md becomes the first page. A link from a page to a file of the repository makes that file a
part of the site, and the link is rewritten. Each package of torchprime gets a page of the
reference. A page that would load something from another host is a warning, so `--strict` fails.
"""

from __future__ import annotations

import logging
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

REPO = Path(__file__).resolve().parents[2]
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(\]\()([^)\s#]+)((?:#[^)\s]*)?\))")
# Tags and rules of style sheets by which a browser loads something; a link to click loads nothing.
LOADS = [
    re.compile(r"<(?:script|img|iframe|source)\b[^>]*?\ssrc=[\"']?([^\"'\s>]+)"),
    re.compile(r"<link\b[^>]*?\shref=[\"']?([^\"'\s>]+)"),
    re.compile(r"url\([\"']?([^\"')]+)"),
    re.compile(r"@import\s+[\"']([^\"']+)"),
]
REFERENCE = "reference"
log = logging.getLogger("mkdocs.hooks.torchprime")


def site_name(path: str) -> str:
    """Return the name in the site's sources of a file, given by its path in the repository."""
    return "index.md" if path == "README.md" else path.removeprefix("docs/")


def repository_path(source: str) -> str:
    """Return the path in the repository of one of the site's sources."""
    if source == "index.md":
        return "README.md"
    return f"docs/{source}" if (REPO / "docs" / source).is_file() else source


def target_of(page: str, link: str) -> str | None:
    """Return the repository path that a page's relative link leads to; None for another link."""
    if "://" in link or link.startswith("mailto:"):
        return None
    path = posixpath.normpath(posixpath.join(posixpath.dirname(page), link))
    return path if (REPO / path).is_file() else None


def with_links(markdown: str, page: str) -> str:
    """Return a page's text with links to files of the repository that lead to them in the site."""
    here = posixpath.dirname(site_name(page))

    def rewritten(link: re.Match[str]) -> str:
        path = target_of(page, link[2])
        if path is None:
            return link[0]
        return link[1] + posixpath.relpath(site_name(path), here or ".") + link[3]

    parts = re.split(f"({FENCE.pattern})", markdown, flags=FENCE.flags)
    return "".join(part if part.startswith("```") else LINK.sub(rewritten, part) for part in parts)


def linked_files() -> list[str]:
    """Return README.md and all files outside docs/ that it and the pages lead to, by links."""
    waiting = ["README.md", *(f"docs/{path.name}" for path in (REPO / "docs").glob("*.md"))]
    found: list[str] = []
    while waiting:
        page = waiting.pop()
        if page in found:
            continue
        found.append(page)
        if page.endswith(".md"):
            text = FENCE.sub("", (REPO / page).read_text(encoding="utf-8"))
            targets = (target_of(page, link) for _, link, _ in LINK.findall(text))
            waiting += [path for path in targets if path is not None]
    return sorted(path for path in found if not path.startswith("docs/"))


def packages() -> dict[str, list[str]]:
    """Return the public modules of each package of torchprime, by dotted names."""
    found: dict[str, list[str]] = {}
    for path in sorted((REPO / "torchprime").rglob("*.py")):
        parts = path.relative_to(REPO).with_suffix("").parts
        if not any(part.startswith("_") for part in parts):
            found.setdefault(".".join(parts[:-1]), []).append(".".join(parts))
    return found


def reference_page(package: str, modules: list[str]) -> str:
    return f"# {package}\n\n" + "\n".join(f"::: {module}\n" for module in modules)


def external_loads(text: str) -> list[str]:
    """Return the addresses on other hosts that a page or style sheet loads without a click."""
    found = [address for pattern in LOADS for address in pattern.findall(text)]
    return [address for address in found if re.match(r"(?:\w+:)?//", address)]


# Called by mkdocs ---------------------------------------------------------------------------------


def on_config(config: Any) -> Any:
    """Put the pages of the reference at the end of the navigation."""
    pages = [{package: f"{REFERENCE}/{package}.md"} for package in packages()]
    config.nav.append({"Reference": pages})
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add README.md, the files that it and the pages link to, and the reference."""
    for path in linked_files():
        content = (REPO / path).read_bytes()
        files.append(File.generated(config, site_name(path), content=content))
    for package, modules in packages().items():
        name = f"{REFERENCE}/{package}.md"
        files.append(File.generated(config, name, content=reference_page(package, modules)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Rewrite the links of a page to files of the repository."""
    return with_links(markdown, repository_path(page.file.src_uri))


def on_post_build(config: Any) -> None:
    """Warn of each address on another host that the finished site loads."""
    for path in sorted(Path(config.site_dir).rglob("*")):
        if path.suffix in (".html", ".css"):
            for address in external_loads(path.read_text(encoding="utf-8")):
                log.warning("%s loads %s from another host", path.name, address)
