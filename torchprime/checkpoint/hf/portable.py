"""The tokenizer of an export, written so that transformers 4.57, 5.x and vLLM read it identically.

tokenizer.json is copied byte for byte and alone defines the tokenization. Every key that would
make a reader rebuild it differently is left out of tokenizer_config.json.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoTokenizer

from torchprime.checkpoint.hf.portable_config import config_if_refused
from torchprime.errors import CheckpointError
from torchprime.files.atomic import write_bytes, write_json
from torchprime.files.json_files import LARGE, read_json_if_there, read_regular
from torchprime.files.template_files import own_templates, write_templates
from torchprime.raw_tokenizer import library_faults, load_tokenizer_json

SPECIAL_TOKENS = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
# Keys bound to a place, a class or remote code of the source; or that contradict tokenizer.json on
# beginning-of-sequence tokens, which 4.57 would follow and 5.x would not.
DROPPED_TOKENIZER_KEYS = (
    "add_bos_token",
    "add_eos_token",
    "auto_map",
    "backend",
    "is_local",
    "local_files_only",
    "name_or_path",
    "processor_class",
    "slow_tokenizer_class",
    "tokenizer_file",
    "vocab_file",
)
# Texts on which wrongly rebuilt tokenizers have been seen to differ: digits, runs of spaces, line
# breaks, contractions, accents, other scripts, emoji, code.
PROBES = (
    "Question:\nTom has 1234567 apples.\n\n\nAnswer:\n 12 + 30 = <<12+30=42>>42\n#### 42",
    "  two  spaces,\ttab; it's I'LL don't\r\n  indented\n\n\nend ",
    "déjà-vu Straße 東京 привет 🙂 é",
    "def f(x):\n    return {'a': [x ** 2]}  # 3.14e-10",
)
TOKENS_TRIED = 4000


def write_tokenizer(
    out: Path,
    tokenizer_folder: Path,
    *,
    eos: int,
    chat_templates: Mapping[str, str] | None = None,
) -> None:
    """Copy the tokenizer so that every reader builds exactly the one in tokenizer.json.

    Args:
        chat_templates: those that were trained with, by name, instead of the tokenizer's own;
            None keeps these.

    Raises:
        CheckpointError: no tokenizer.json, or the stop token is not in it.
    """
    source = tokenizer_folder / "tokenizer.json"
    if not os.path.lexists(source):
        raise CheckpointError(
            f'There is no tokenizer.json in {tokenizer_folder}. Make one: python -c "from '
            f"transformers import AutoTokenizer as T; T.from_pretrained('{tokenizer_folder}')"
            ".save_pretrained('NEW')\", and give NEW as model.tokenizer_name."
        )
    settings = read_json_if_there(tokenizer_folder / "tokenizer_config.json")
    if chat_templates is None:
        chat_templates = own_templates(tokenizer_folder, settings)
    settings = _portable_tokenizer_config(settings, _token_of(source, eos))
    settings.pop("chat_template", None)
    if (inline := write_templates(out, chat_templates)) is not None:
        settings["chat_template"] = inline
    write_bytes(out / "tokenizer.json", read_regular(source, most=LARGE))
    write_json(out / "tokenizer_config.json", settings)
    write_json(out / "special_tokens_map.json", _special_tokens_map(settings))


def _token_of(tokenizer_json: Path, token_id: int) -> str:
    token = load_tokenizer_json(tokenizer_json)[0].id_to_token(token_id)
    if token is None:
        raise CheckpointError(f"The stop token's id {token_id} is not in {tokenizer_json}.")
    return token


def _portable_tokenizer_config(source: Mapping[str, Any], eos_token: str) -> dict[str, Any]:
    result = {key: value for key, value in source.items() if key not in DROPPED_TOKENIZER_KEYS}
    result["tokenizer_class"] = "PreTrainedTokenizerFast"
    if result.get("eos_token") is None:
        result["eos_token"] = eos_token
    # 5.x writes a list under a key for which 4.57 accepts only a mapping, and fails on the list.
    if isinstance(result.get("extra_special_tokens"), list):
        more = result.pop("extra_special_tokens")
        if more:
            result.setdefault("additional_special_tokens", more)
    return result


def _special_tokens_map(settings: Mapping[str, Any]) -> dict[str, Any]:
    keys = [f"{kind}_token" for kind in SPECIAL_TOKENS]
    result = {key: settings[key] for key in keys if settings.get(key) is not None}
    if settings.get("additional_special_tokens"):
        result["additional_special_tokens"] = settings["additional_special_tokens"]
    return result


def auto_tokenizer(folder: Path) -> Any:
    """Load the tokenizer of a folder with transformers' AutoTokenizer.

    Raises:
        CheckpointError: it cannot load the folder.
    """
    config = config_if_refused(read_json_if_there(folder / "config.json"))
    given = {} if config is None else {"config": config}
    with library_faults(
        f"transformers {transformers.__version__} cannot load the tokenizer in {folder} "
        "(tokenizer.json, tokenizer_config.json)"
    ):
        return AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, **given
        )


def check_tokenizer(folder: Path) -> None:
    """Compare the ids that AutoTokenizer (and so vLLM) gives with those of tokenizer.json itself.

    transformers replaces the pre-tokenizer for some model types whatever tokenizer.json says; a
    model trained with the one would then be served with the other.

    Raises:
        CheckpointError: with the first text that differs and both id lists.

    A wrong split shows where a token reaches over it, so besides `PROBES` the text of the tokens
    themselves is tried, of up to some thousands of them, evenly over the vocabulary. Added tokens
    are all tried: each must be one id, alone and between letters.
    """
    own, _ = load_tokenizer_json(folder / "tokenizer.json")
    theirs = auto_tokenizer(folder)
    with library_faults(f"The tokenizer in {folder} fails on a text"):
        ids = sorted(own.get_vocab().values())
        texts = [*PROBES, *own.decode_batch([[i] for i in ids[:: len(ids) // TOKENS_TRIED + 1]])]
        added = [token.content for token in own.get_added_tokens_decoder().values()]
        texts += [*added, *(f"a{text}b" for text in added)]
        encoded, others = own.encode_batch(texts), theirs(texts)["input_ids"]
    for text, mine, other in zip(texts, encoded, others, strict=True):
        if (ours := mine.ids) != other:
            raise CheckpointError(
                f"The tokenizer in {folder} is read wrongly by transformers' AutoTokenizer "
                f"({type(theirs).__name__}): {text!r} becomes {other}, but tokenizer.json says "
                f"{ours}. For model_type qwen2 it imposes Qwen2's own pre-tokenizer: use the "
                "tokenizer of the model's family (model.tokenizer_name). If the text is a special "
                "token, tokenizer_config.json (added_tokens_decoder) describes it in another way."
            )
