"""HTML pages for a browser: one document that loads nothing, whatever texts it contains.

Each page has a folder in torchprime/assets with its template (page.html.jinja), its style
(page.css, after the style that all pages share) and optionally a script (page.js). A content
security policy forbids the browser all requests, and any script but the page's own. Template values
are escaped, and control characters and marks of direction in them are made visible
(text/visible.py).
The template is rendered in jinja's sandbox, like every template, so a replaced template file can't
run code.
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
from torchprime.text.visible import clean

SHOWN_IDS = 5
SHARED = "page"  # the folder of the parts that all pages share


def first_of(values: Iterable[str], count: int = SHOWN_IDS) -> str:
    """Return the first few items, and the number of the others."""
    values = list(values)
    return ", ".join(values[:count]) + (", ..." if len(values) > count else "")


def by_count(rejected: Mapping[str, list[str]]) -> list[tuple[str, list[str]]]:
    """Return reasons with their row ids, the most frequent first."""
    return sorted(rejected.items(), key=lambda item: -len(item[1]))


def render_page(name: str, **values: Any) -> str:
    """Render the page of this folder with these values.

    The template also gets `style`, `policy` and `version`, and `script` if there is one. It may use
    macros of the shared folder's templates.
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
    """Return a template value as text to write; Markup was made here and stays as it is."""
    return clean(value) if isinstance(value, str) and not isinstance(value, Markup) else value
