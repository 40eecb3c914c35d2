"""Pages for a browser: one HTML document that loads nothing, whatever the texts in it hold.

A page has a folder in torchprime/assets with its template (page.html.jinja), its style (page.css,
behind the one that all pages share) and perhaps a script (page.js). A policy in the document
forbids the browser any request, and any script but its own. What the template writes is escaped,
and control characters and marks of direction in it are written out (visible.py). The template
itself is rendered in jinja's sandbox, as every template is here: should somebody exchange the file,
it still runs nothing.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment
from markupsafe import Markup

import torchprime
from torchprime.config.compose import assets_dir
from torchprime.data.shared.notes import most_first
from torchprime.visible import clean

SHOWN_IDS = 5
SHARED = "page"  # the folder of what all pages have


def first_of(values: Iterable[str], count: int = SHOWN_IDS) -> str:
    """The first few, and that there are more."""
    values = list(values)
    return ", ".join(values[:count]) + (", ..." if len(values) > count else "")


def by_count(rejected: Mapping[str, list[str]]) -> list[tuple[str, list[str]]]:
    """Reasons with their row ids, the most frequent first."""
    return sorted(rejected.items(), key=lambda item: -len(item[1]))


def render_page(name: str, **values: Any) -> str:
    """The page of this folder with these values.

    The template gets `style`, `policy` and `version` too, `script` where there is one, and may use
    what the shared folder's templates define.
    """
    folder = assets_dir() / name
    environment = ImmutableSandboxedEnvironment(
        loader=jinja2.FileSystemLoader([folder, assets_dir() / SHARED]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_writable,
    )
    environment.filters |= {"some": first_of, "by_count": by_count, "most_first": most_first}
    styles = [assets_dir() / SHARED / "page.css", folder / "page.css"]
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    script = folder / "page.js"
    if script.is_file():
        text = script.read_text(encoding="utf-8")
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        policy += f"; script-src 'sha256-{digest}'"
        values["script"] = Markup(text)
    return environment.get_template("page.html.jinja").render(
        style=Markup("".join(path.read_text(encoding="utf-8") for path in styles)),
        policy=Markup(policy),
        version=torchprime.__version__,
        **values,
    )


def _writable(value: Any) -> Any:
    """What an expression in the template becomes; Markup was made here and is left as it is."""
    return clean(value) if isinstance(value, str) and not isinstance(value, Markup) else value
