"""The chat templates in a tokenizer's folder, in the places where transformers and vLLM look.

    chat_template.jinja                         the template named `default`
    additional_chat_templates/NAME.jinja        one each; with the file above they hide what follows
    tokenizer_config.json: chat_template        one text, or a list of {name, template}
    chat_template.json: chat_template           the same, as processors store theirs

A name comes from a file of unknown origin and becomes a file name in the export, so only plain
names are accepted.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torchprime.errors import CheckpointError
from torchprime.files.atomic import write_text
from torchprime.files.foreign_names import inside
from torchprime.files.json_files import SMALL, read_json_if_there, read_regular

DEFAULT = "default"
FOLDER_OF_OTHERS = "additional_chat_templates"
PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}")


def own_templates(folder: Path, settings: Mapping[str, Any]) -> dict[str, str]:
    """Return the folder's templates by name, `{}` if there are none.

    Args:
        settings: tokenizer_config.json, parsed.

    Raises:
        CheckpointError: a file that cannot be read, a name that is not plain, another form.
    """
    found: dict[str, str] = {}
    file = folder / "chat_template.jinja"
    if os.path.lexists(file):
        found[DEFAULT] = read_text(file)
    for path in sorted((folder / FOLDER_OF_OTHERS).glob("*.jinja")):
        found[checked_name(path.name.removesuffix(".jinja"), path)] = read_text(path)
    if found:
        return found
    for name, given in (
        ("tokenizer_config.json", settings.get("chat_template")),
        ("chat_template.json", _in_json(folder / "chat_template.json")),
    ):
        if isinstance(given, str):
            return {DEFAULT: _checked_text(given, folder / name)}
        if given is not None:
            return _listed(given, folder / name)
    return {}


def _in_json(path: Path) -> object:
    return read_json_if_there(path).get("chat_template")


def _listed(given: object, path: Path) -> dict[str, str]:
    """Return the templates in one file: a list of {name, template}, or an object with both."""
    pairs: list[tuple[object, object]] = []
    if isinstance(given, Mapping):
        pairs = list(given.items())
    elif isinstance(given, list):
        pairs = [(e.get("name"), e.get("template")) for e in given if isinstance(e, Mapping)]
    texts = {
        checked_name(name, path): _checked_text(text, path)
        for name, text in pairs
        if isinstance(text, str)
    }
    if not texts:
        raise CheckpointError(
            f"chat_template in {path} is {type(given).__name__}, expected a text or a list of "
            'objects {"name": ..., "template": ...}. Save the one to train with as a file and set '
            "dataset.chat_template to its path"
        )
    return texts


def _checked_text(text: str, path: Path) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise CheckpointError(
            f"{path}: a chat template holds half of a character ({error.reason}), which no file "
            "can hold. Write the whole character."
        ) from error
    return text


def checked_name(name: object, path: Path) -> str:
    """Return a template's name after checking that it can be a file name in any folder.

    Raises:
        CheckpointError: it is a path, hidden, empty or no text.
    """
    if isinstance(name, str) and PLAIN_NAME.fullmatch(name):
        return name
    raise CheckpointError(
        f"{path}: a chat template is named {name!r:.200}, expected letters, digits, "
        f"dots, dashes and underscores (default, tool_use, rag). Its name becomes a file's name: "
        "do not use this folder before you know who wrote that, or rename the template"
    )


def write_templates(folder: Path, templates: Mapping[str, str]) -> object:
    """Write the files of a folder's templates; return the value for tokenizer_config.json.

    Readers look in one of the two places, so both have the templates; None if there are none.

    Raises:
        CheckpointError: a name that is not plain.
    """
    for name, text in templates.items():
        checked_name(name, folder)
        file = "chat_template.jinja" if name == DEFAULT else f"{FOLDER_OF_OTHERS}/{name}.jinja"
        path = inside(folder, file, str(folder))
        path.parent.mkdir(exist_ok=True)
        write_text(path, text)
    if list(templates) == [DEFAULT]:
        return templates[DEFAULT]
    listed = [{"name": name, "template": text} for name, text in templates.items()]
    return listed or None


def read_text(path: Path) -> str:
    """Return a template's source with its line breaks unchanged.

    Raises:
        CheckpointError: the file cannot be read as UTF-8.
    """
    try:
        return read_regular(path, most=SMALL).decode("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"the chat template {path} cannot be read: {error}") from error
