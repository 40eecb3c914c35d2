"""The small files of an export, spelled so that transformers 4.57, 5.x and vLLM read the same.

config.json says the rope and the dtype in both spellings; tokenizer.json is copied byte for byte
and is the only truth about tokenization: what would make a reader rebuild it differently is
left out of tokenizer_config.json. The trained stop token joins those that the base already had.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers
import torch
from transformers import AutoTokenizer

from torchprime.atomic import read_regular, write_bytes, write_json
from torchprime.checkpoint.hf_read import EMBEDDING, HEAD
from torchprime.errors import CheckpointError
from torchprime.models.architecture import Rope, architecture_from_hf
from torchprime.template_files import own_templates, write_templates

CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
SPECIAL_TOKENS = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
# Bound to a place, a class or remote code of the source; or a second opinion beside tokenizer.json
# on beginning-of-sequence tokens, which 4.57 would follow and 5.x would not.
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
# Where tokenizers that were rebuilt wrongly have been seen to differ: digits, runs of spaces, line
# breaks, contractions, accents, other scripts, emoji, code.
PROBES = (
    "Question:\nTom has 1234567 apples.\n\n\nAnswer:\n 12 + 30 = <<12+30=42>>42\n#### 42",
    "  two  spaces,\ttab; it's I'LL don't\r\n  indented\n\n\nend ",
    "déjà-vu Straße 東京 привет 🙂 é",
    "def f(x):\n    return {'a': [x ** 2]}  # 3.14e-10",
)
TOKENS_TRIED = 4000


def portable_config(
    config: Mapping[str, Any], spec: Mapping[str, tuple[int, ...]], dtype: torch.dtype, eos: int
) -> dict[str, Any]:
    """The exported config.json: the source's keys, with all spellings that readers look for.

    Raises:
        CheckpointError: the config and the weights' names and shapes contradict each other.
    """
    architecture = architecture_from_hf(config)
    tied = HEAD not in spec
    if tied != architecture.tie_word_embeddings:
        raise CheckpointError(
            f"config.json says tie_word_embeddings={architecture.tie_word_embeddings}, but the "
            f"weights to export come {'without' if tied else 'with'} {HEAD}; a tied model has none."
        )
    rows = spec[EMBEDDING][0] if EMBEDDING in spec else None
    if rows != architecture.vocab_size:
        raise CheckpointError(
            f"config.json says vocab_size={architecture.vocab_size}, but {EMBEDDING} has "
            f"{'no' if rows is None else rows} rows."
        )
    result = {
        key: value for key, value in config.items() if key not in ("auto_map", "_name_or_path")
    }
    result |= {
        "architectures": [CLASSES[architecture.family]],
        "tie_word_embeddings": tied,
        "num_key_value_heads": architecture.num_key_value_heads,
        "head_dim": architecture.head_dim,
        "rms_norm_eps": architecture.rms_norm_eps,
        **both_dtype_spellings(dtype),
        **_both_rope_spellings(architecture.rope),
    }
    if result.get("eos_token_id") is None:
        result["eos_token_id"] = eos
    if architecture.family == "mistral":
        # Left out, transformers would take its own default of 4096.
        result["sliding_window"] = architecture.sliding_window
    return result


def both_dtype_spellings(dtype: torch.dtype) -> dict[str, str]:
    """What config.json says of its weights' dtype."""
    name = str(dtype).removeprefix("torch.")
    return {"dtype": name, "torch_dtype": name}


def _both_rope_spellings(rope: Rope) -> dict[str, Any]:
    scaling: dict[str, Any] = {"rope_type": rope.kind}
    if rope.kind != "default":
        scaling["factor"] = rope.factor
    if rope.kind == "llama3":
        scaling["low_freq_factor"] = rope.low_freq_factor
        scaling["high_freq_factor"] = rope.high_freq_factor
        scaling["original_max_position_embeddings"] = rope.original_max_position
    return {
        "rope_theta": rope.theta,
        "rope_scaling": None if rope.kind == "default" else scaling,
        "rope_parameters": {"rope_theta": rope.theta, **scaling},
    }


def portable_generation_config(
    source: Mapping[str, Any] | None, config: Mapping[str, Any], eos: int
) -> dict[str, Any]:
    """The source's generation settings, with the trained stop token among the stop tokens."""
    dropped = ("_from_model_config", "transformers_version")
    result = {key: value for key, value in (source or {}).items() if key not in dropped}
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if result.get(key) is None and config.get(key) is not None:
            result[key] = config[key]
    stops = result.get("eos_token_id")
    stops = [] if stops is None else [stops] if isinstance(stops, int) else list(stops)
    if eos not in stops:
        stops.append(eos)
    result["eos_token_id"] = stops[0] if len(stops) == 1 else stops
    return result


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; a CheckpointError names a file that is malformed."""
    try:
        content = json.loads(read_regular(path))
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not an object.")
    return content


def write_tokenizer(
    out: Path,
    tokenizer_folder: Path,
    *,
    eos: int,
    chat_templates: Mapping[str, str] | None = None,
) -> None:
    """Copy the tokenizer so that every reader builds exactly tokenizer.json.

    Args:
        chat_templates: those that were trained with, by name, instead of the tokenizer's own;
            None keeps these.

    Raises:
        CheckpointError: no tokenizer.json, or the stop token is not in it.
    """
    source = tokenizer_folder / "tokenizer.json"
    if not source.is_file():
        raise CheckpointError(
            f'There is no tokenizer.json in {tokenizer_folder}. Make one: python -c "from '
            f"transformers import AutoTokenizer as T; T.from_pretrained('{tokenizer_folder}')"
            ".save_pretrained('NEW')\", and give NEW as model.tokenizer_name."
        )
    settings_path = tokenizer_folder / "tokenizer_config.json"
    settings = read_json(settings_path) if settings_path.is_file() else {}
    if chat_templates is None:
        chat_templates = own_templates(tokenizer_folder, settings)
    settings = _portable_tokenizer_config(settings, _token_of(source, eos))
    settings.pop("chat_template", None)
    if (inline := write_templates(out, chat_templates)) is not None:
        settings["chat_template"] = inline
    write_bytes(out / "tokenizer.json", source.read_bytes())
    write_json(out / "tokenizer_config.json", settings)
    write_json(out / "special_tokens_map.json", _special_tokens_map(settings))


def _token_of(tokenizer_json: Path, token_id: int) -> str:
    try:
        token = tokenizers.Tokenizer.from_file(str(tokenizer_json)).id_to_token(token_id)
    except Exception as error:  # the library raises bare Exception for a malformed file
        raise CheckpointError(f"{tokenizer_json} is not a tokenizer: {error}") from error
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


def check_tokenizer(folder: Path) -> None:
    """Compare the ids that AutoTokenizer gives (and so vLLM) with tokenizer.json's own.

    transformers replaces the pre-tokenizer for some model types whatever tokenizer.json says; a
    model trained with the one would then be served with the other.

    Raises:
        CheckpointError: with the first text that differs and both id lists.

    A wrong split shows where a token reaches over it, so besides `PROBES` the text of the tokens
    themselves is tried, of up to some thousands of them, evenly over the vocabulary. Added tokens
    are all tried: each must be one id, alone and between letters.
    """
    own = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    own.no_truncation()
    own.no_padding()
    theirs = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    ids = sorted(own.get_vocab().values())
    texts = [*PROBES, *own.decode_batch([[i] for i in ids[:: len(ids) // TOKENS_TRIED + 1]])]
    added = [token.content for token in own.get_added_tokens_decoder().values()]
    texts += [*added, *(f"a{text}b" for text in added)]
    encoded = own.encode_batch(texts)
    for text, mine, other in zip(texts, encoded, theirs(texts)["input_ids"], strict=True):
        if (ours := mine.ids) != other:
            raise CheckpointError(
                f"The tokenizer in {folder} is read wrongly by transformers' AutoTokenizer "
                f"({type(theirs).__name__}): {text!r} becomes {other}, but tokenizer.json says "
                f"{ours}. For model_type qwen2 it imposes Qwen2's own pre-tokenizer: use the "
                "tokenizer of the model's family (model.tokenizer_name). If the text is a special "
                "token, tokenizer_config.json (added_tokens_decoder) describes it in another way."
            )
