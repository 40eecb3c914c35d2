"""Analysis of a chat template's source without rendering: its variables, and its constants."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import jinja2
from jinja2 import meta, nodes

from torchprime.data.shared.fields import printable
from torchprime.data.templates.render import DATE_FUNCTION, ChatTemplate, compiled_template
from torchprime.errors import DataError

# Variables that every rendering provides.
GIVEN = ("messages", "tools", "add_generation_prompt", "bos_token", "eos_token")
# Names of parameters of transformers' renderer.
RENDERERS_OWN = ("conversations", "chat_template", "return_assistant_tokens_mask")


@lru_cache(maxsize=32)
def tree_of(text: str) -> nodes.Template:
    """Return the source's syntax tree, parsed with the environment that renders it.

    Raises:
        jinja2.TemplateSyntaxError: the source is not jinja.
    """
    return compiled_template(text).environment.parse(text)


@lru_cache(maxsize=32)
def variables_of(text: str) -> frozenset[str]:
    """Return the names of a template's variables: messages, tools, enable_thinking, ..."""
    return frozenset(meta.find_undeclared_variables(tree_of(text)))


def tells_date(text: str) -> bool:
    """Return True if a template uses the date."""
    names = tree_of(text).find_all(nodes.Name)
    return any(isinstance(node, nodes.Name) and node.name == DATE_FUNCTION for node in names)


def check_syntax(text: str, name: str) -> None:
    """Raise a DataError with the place where a template is not valid jinja."""
    try:
        tree_of(text)
    except jinja2.TemplateSyntaxError as error:
        raise DataError(
            f"the chat template ({name}) is not valid jinja: {error.message} at line {error.lineno}"
        ) from error
    except Exception as error:  # nested too deeply for its parser or for Python's compiler
        raise DataError(
            f"the chat template ({name}) cannot be compiled: {type(error).__name__}: {error}"
        ) from error


def checked_options(
    options: Mapping[str, Any], template: ChatTemplate
) -> tuple[tuple[str, str], ...]:
    """Return dataset.template_options in a template's form, sorted by name.

    Raises:
        DataError: an option that the template does not read, or that every rendering provides.
    """
    read = {name for text in template.texts.values() for name in variables_of(text)}
    readable = sorted(read - {*GIVEN})
    for name in options:
        given = f"dataset.template_options={{{name}: {printable(repr(options[name]), 60)}}}"
        if name in (*GIVEN, *RENDERERS_OWN):
            raise DataError(f"{given}: {name} is given by the run. Leave it out")
        if name not in read:
            near = difflib.get_close_matches(name, readable, n=1)
            hint = f"Did you mean {near[0]}?" if near else "Leave it out"
            raise DataError(
                f"{given}: the chat template ({template.name}) does not read {name}; it reads "
                f"{', '.join(readable) or 'no options'}. {hint}"
            )
    try:
        return tuple((name, json.dumps(options[name])) for name in sorted(options))
    except (TypeError, ValueError) as error:
        raise DataError(
            f"dataset.template_options: given {printable(repr(dict(options)))}, expected values "
            f"that JSON can write: {error}"
        ) from error
