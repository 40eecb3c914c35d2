"""Special tokens added to a tokenizer, in a new folder that all later steps read.

The tokenizers library decides the ids, as it does for transformers' `add_special_tokens`:

    a text that the tokenizer lacks          a new id, after all others
    an added token that is not special yet   keeps its id and becomes special
    an ordinary token of the vocabulary      keeps its id and becomes special
    a special token                          nothing changes

The folder is cached under a hash of the source's files and the texts, beside prepared data, so that
worker processes and the export load the same files as the run. Only tokenizer.json and the lists of
tokens in the settings differ from the source; chat templates and stop tokens are copied.
"""

from __future__ import annotations

import atexit
import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torchprime.data.shared import cache
from torchprime.data.tokenizer.load import load_raw
from torchprime.errors import CheckpointError, RuntimeSetupError
from torchprime.files.atomic import write_bytes, write_json, write_text
from torchprime.files.foreign_names import inside
from torchprime.files.hashing import hash_file
from torchprime.files.json_files import LARGE, SMALL, read_json, read_json_if_there, read_regular
from torchprime.files.private_folders import require_private
from torchprime.raw_tokenizer import load_tokenizer_json

VERSION = 1  # of what is written; part of the folder's key
KEY = "model.add_special_tokens"
JSON_FILE, SETTINGS_FILE, MAP_FILE = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
)
# The files of a tokenizer's folder besides its tokens. Other files (vocab.json, tokenizer.model,
# added_tokens.json) repeat tokenizer.json in older forms and would lack the new tokens.
COPIED = ("generation_config.json", "chat_template.*", "additional_chat_templates/*")
# A token as the library's `add_special_tokens` makes it from a text.
PLAIN = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}


@dataclass(frozen=True)
class SpecialTokens:
    """A tokenizer's folder with the requested special tokens, and the outcome for each text.

    Attributes:
        new: texts that the tokenizer lacked, and their ids.
        kept: texts that were special tokens already.
        added_before: texts of added tokens that were not special.
        ordinary: texts of ordinary tokens of the vocabulary.
    """

    folder: Path
    new: dict[str, int] = field(default_factory=dict)
    kept: dict[str, int] = field(default_factory=dict)
    added_before: dict[str, int] = field(default_factory=dict)
    ordinary: dict[str, int] = field(default_factory=dict)


def add_special_tokens(source: Path, texts: Sequence[str], root: Path) -> SpecialTokens:
    """Make the texts special tokens of the tokenizer in `source`.

    Args:
        texts: distinct, none of them empty.
        root: the place of the new folder; if it can't be written, a temporary folder that ends
            with this process is used.

    Returns:
        The new folder, or `source` if it has all of them as special tokens.

    Raises:
        CheckpointError: the tokenizer cannot be loaded, or a new token would get the id of another
            token.
    """
    raw, _ = load_raw(source)
    before = raw.get_vocab(with_added_tokens=True)
    added = {t.content: t.special for t in raw.get_added_tokens_decoder().values()}
    missing = [text for text in texts if not added.get(text)]
    raw.add_special_tokens(missing)
    after = raw.get_vocab(with_added_tokens=True)
    _check_ids(before, after, missing, source)
    found = SpecialTokens(
        _derived_folder(source, missing, after, root) if missing else source,
        new={text: after[text] for text in texts if text not in before},
        kept={text: after[text] for text in texts if added.get(text)},
        added_before={text: after[text] for text in missing if text in added},
        ordinary={text: after[text] for text in missing if text in before and text not in added},
    )
    return found


def _check_ids(
    before: Mapping[str, int], after: Mapping[str, int], texts: Sequence[str], source: Path
) -> None:
    """Check that no token loses its id and that no two tokens share one."""
    taken = {number: text for text, number in before.items()}
    for text in texts:
        if text not in before and after[text] in taken:
            raise CheckpointError(
                f"{KEY}: the ids of the tokenizer in {source} have gaps, and the tokenizers "
                f"library would give {text!r} the id {after[text]}, which "
                f"{taken[after[text]]!r} has. Fill the gaps in its tokenizer.json, or add the "
                "tokens there by hand and set model.tokenizer_name to that folder."
            )


# The folder ---------------------------------------------------------------------------------------


def _derived_folder(source: Path, texts: Sequence[str], ids: Mapping[str, int], root: Path) -> Path:
    found = [path for pattern in COPIED for path in sorted(source.glob(pattern))]
    copied = [path for path in found if path.is_file()]
    read = [source / name for name in (JSON_FILE, SETTINGS_FILE, MAP_FILE)]
    ingredients = {
        "version": VERSION,
        "tokens": list(texts),
        "files": {
            path.relative_to(source).as_posix(): hash_file(path)["sha256"]
            for path in [*read, *copied]
            if path.is_file()
        },
    }
    chosen = {text: ids[text] for text in texts}

    def write(folder: Path) -> None:
        _write(folder, source, chosen, copied)

    key = cache.cache_key(ingredients)
    try:
        # The folder is beside prepared data, and other users must not be able to exchange it
        # either.
        require_private(root.parent, cache.KEY)
        return cache.find(root, key) or cache.build(root, key, ingredients, write)
    except (OSError, RuntimeSetupError):  # of prepared data, which comes later, this is told
        folder = Path(tempfile.mkdtemp(prefix="torchprime-tokenizer-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        write(folder)
        return folder


def _write(folder: Path, source: Path, chosen: Mapping[str, int], copied: Sequence[Path]) -> None:
    for path in copied:
        target = inside(folder, path.relative_to(source).as_posix(), str(source))
        target.parent.mkdir(exist_ok=True)
        write_bytes(target, read_regular(path, most=SMALL))
    tokens = {number: {"content": text, **PLAIN} for text, number in chosen.items()}
    _write_tokenizer(folder / JSON_FILE, read_json(source / JSON_FILE, most=LARGE), tokens)
    settings, older = (read_json_if_there(source / name) for name in (SETTINGS_FILE, MAP_FILE))
    if isinstance(known := settings.get("added_tokens_decoder"), dict):
        known.update({str(number): {**token, "special": True} for number, token in tokens.items()})
    _list_tokens(settings, list(chosen))
    write_json(folder / SETTINGS_FILE, settings)
    if older:
        _list_tokens(older, list(chosen))
        write_json(folder / MAP_FILE, older)


def _write_tokenizer(path: Path, content: dict[str, Any], tokens: Mapping[int, Any]) -> None:
    """Add the tokens to the file's own list, so that everything else in it stays unchanged.

    The library renumbers added tokens when it reads the file, in the order of the list.
    """
    others = [token for token in content.get("added_tokens") or [] if token["id"] not in tokens]
    mine = [{"id": number, **token, "special": True} for number, token in tokens.items()]
    content["added_tokens"] = sorted([*others, *mine], key=lambda token: token["id"])
    write_text(path, json.dumps(content, ensure_ascii=False))  # indented takes seconds
    read, _ = load_tokenizer_json(path)
    wrong = [n for n, token in tokens.items() if read.token_to_id(token["content"]) != n]
    if wrong:
        raise CheckpointError(
            f"{KEY}: the tokenizers library reads back other ids than it gave ({wrong[:5]}). Add "
            "the tokens to tokenizer.json by hand, and set model.tokenizer_name to that folder."
        )


def _list_tokens(settings: dict[str, Any], texts: list[str]) -> None:
    """List the tokens in the two keys where versions of transformers read them."""
    newer = settings.get("extra_special_tokens")
    listed = settings.get("additional_special_tokens")
    if isinstance(listed, list) or not isinstance(newer, list):
        newer = settings["additional_special_tokens"] = list(listed or [])
    newer += [text for text in texts if text not in newer]
