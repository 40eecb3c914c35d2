"""config.json and generation_config.json of an export, written so that all readers agree on them.

The settings of the trained model are written out in full, in the spellings of transformers 4 and 5.
The source's other keys are copied, except those that transformers would refuse when it loads the
folder or saves it again: a null or list instead of a number, sampling settings beside
do_sample=false. Every such repair is returned as a line for the user.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypedDict

import torch
import transformers
from transformers import AutoConfig, GenerationConfig
from transformers.utils import logging as hf_logging

from torchprime.checkpoint.hf.weight_names import EMBEDDING, HEAD
from torchprime.errors import CheckpointError
from torchprime.files.json_files import token_ids
from torchprime.models.architecture import (
    DROPOUTS,
    MULTIPLIERS,
    SOFTCAPS,
    Architecture,
    architecture_from_hf,
)
from torchprime.models.families import FAMILIES, text_part
from torchprime.models.layer_kinds import FULL, SLIDING, WINDOW
from torchprime.models.rope_config import ORIGINAL, PARTIAL, both_spellings

# Keys of remote code, of the source's place, of quantization, of parts that are not exported; and
# keys that the ones written out make redundant.
DROPPED = {
    *("auto_map", "_name_or_path", "quantization_config", "per_layer_config"),
    *("text_config", "text_encoder", "decoder", "generator"),
    *("attention_bias", "mlp_bias", "layer_types", "use_sliding_window"),
    *("sliding_window", "sliding_window_pattern", "_sliding_window_pattern", ORIGINAL, PARTIAL),
}
# Settings of a call, not of the model: with other values, loading or calling the export fails.
OF_A_CALL = {"return_dict": True, "output_hidden_states": False, "output_attentions": False}
IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
# Keys of generation_config.json that transformers accepts with any type, and then fails on when it
# generates.
NUMBERS = re.compile(
    r"temperature|top_[kph]|min_p|typical_p|\w+_cutoff|\w+_penalty|(max|min|num)_\w+"
)
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "top_h", "typical_p")


class Portable(NamedTuple):
    """A small file's content, and the repairs made in it, as lines for the user."""

    content: dict[str, Any]
    repairs: list[str]


def portable_config(
    config: Mapping[str, Any], spec: Mapping[str, tuple[int, ...]], dtype: torch.dtype, eos: int
) -> Portable:
    """Return the exported config.json: the model's settings in all spellings, and the source's
    other keys.

    Raises:
        CheckpointError: the config and the weights' names and shapes contradict each other.
    """
    config = text_part(config)
    architecture = architecture_from_hf(config)
    _check_shapes(architecture, spec)
    written = {"model_type": architecture.family, **_written(architecture, config)}
    written |= both_dtype_spellings(dtype)
    if not token_ids(config, "eos_token_id", "config.json"):
        written["eos_token_id"] = eos
    others = {k: v for k, v in config.items() if k not in DROPPED and k not in written}
    repairs: list[str] = []
    for key, usual in OF_A_CALL.items():
        if (given := others.pop(key, usual)) is not usual:
            repairs.append(f"config.json: the export leaves out {key}={given!r:.60}.")
    for key in ("bos_token_id", "pad_token_id"):
        _repair_id(others, key, architecture.family, architecture.vocab_size, repairs)
    others = _accepted(others, _config_reader(written, repairs), "config.json", repairs)
    # The source's key order, so that both files can be compared side by side.
    whole = {**others, **written}
    keys = dict.fromkeys((*config, *written, *others))
    return Portable({k: whole[k] for k in keys if k in whole}, repairs)


def _check_shapes(architecture: Architecture, spec: Mapping[str, tuple[int, ...]]) -> None:
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


def _written(a: Architecture, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys that define the model's computation, each with its value."""
    return {
        "architectures": [FAMILIES[a.family].hf_class],
        "vocab_size": a.vocab_size,
        "hidden_size": a.hidden_size,
        "intermediate_size": a.intermediate_size,
        "num_hidden_layers": a.num_hidden_layers,
        "num_attention_heads": a.num_attention_heads,
        "num_key_value_heads": a.num_key_value_heads,
        "head_dim": a.head_dim,
        FAMILIES[a.family].activation[0]: a.activation,
        "rms_norm_eps": a.rms_norm_eps,
        **{key: 0.0 for key in DROPOUTS if key == DROPOUTS[0] or key in config},
        "tie_word_embeddings": a.tie_word_embeddings,
        "max_position_embeddings": a.max_position_embeddings,
        **_biases(a),
        **_window(a, config),
        **_rope(a),
        **_multipliers(a),
        **({"query_pre_attn_scalar": _scalar(a)} if FAMILIES[a.family].query_scale else {}),
        # null turns one off, where a family has it by default.
        **{key: getattr(a, SOFTCAPS[key]) for key in FAMILIES[a.family].softcaps},
    }


def _scalar(a: Architecture) -> int:
    """Return query_pre_attn_scalar."""
    return a.head_dim if a.query_pre_attn_scalar is None else int(a.query_pre_attn_scalar)


def _rope(a: Architecture) -> dict[str, Any]:
    """Return the keys of the rotary positions."""
    family, context = FAMILIES[a.family], a.max_position_embeddings
    keys = both_spellings(a.rope, context, partial=family.rope.partial is not None)
    if family.local_rope is None:
        return keys
    local = both_spellings(a.ropes[1], context, partial=False)
    keys[family.local_theta] = local["rope_theta"]
    nested = {FULL: keys["rope_parameters"], SLIDING: local["rope_parameters"]}
    return {**keys, "rope_parameters": nested}


def _multipliers(a: Architecture) -> dict[str, float]:
    """Return Granite's multipliers."""
    if not FAMILIES[a.family].multipliers:
        return {}
    assert a.embedding_scale is not None and a.query_pre_attn_scalar is not None
    attention = a.query_pre_attn_scalar**-0.5
    numbers = (a.embedding_scale, attention, a.residual_scale, a.logits_divisor)
    return dict(zip(MULTIPLIERS, numbers, strict=True))


def _biases(a: Architecture) -> dict[str, bool]:
    """Return the keys that turn biases on or off; none for a bias that the family fixes."""
    family = FAMILIES[a.family]
    pairs = (
        (family.qkv_bias, a.qkv_bias),
        (family.out_bias, a.out_bias),
        (family.mlp_bias, a.mlp_bias),
    )
    return {bias.key: has for bias, has in pairs if bias.key is not None}


class WindowKeys(TypedDict, total=False):
    """The sliding-window keys of config.json, of which each family has its own.

    `layer_types` names the layers that attend to the last `sliding_window` tokens only. Readers
    that do not know it take those from `max_window_layers` on. `no_rope_layers` has a 1 for each
    layer that rotates its queries and keys.
    """

    use_sliding_window: bool
    sliding_window: int | None
    max_window_layers: int
    layer_types: list[str]
    no_rope_layers: list[int]


def _window(a: Architecture, config: Mapping[str, Any]) -> WindowKeys:
    """Return the sliding-window keys. If sliding_window were absent, a family's default would
    apply; with it, layer_types must fit."""
    kind = FAMILIES[a.family].window
    windows = [layer.window for layer in a.layers]
    window = next((each for each in windows if each is not None), None)
    if kind == "none":
        return {}
    if kind == "all":
        return {"sliding_window": window}
    if kind == "pattern":
        # Without a window nothing reads its size; transformers wants one.
        size = WINDOW if window is None else window
        return {"sliding_window": size, "layer_types": _layer_types(windows)}
    keys: WindowKeys = {"use_sliding_window": window is not None, "sliding_window": window}
    if window is not None:
        keys["layer_types"] = _layer_types(windows)
    if kind == "no_rope":
        keys["no_rope_layers"] = [int(layer.rope is not None) for layer in a.layers]
    elif window is not None:
        keys["max_window_layers"] = windows.index(window)
    return keys


def _layer_types(windows: Sequence[int | None]) -> list[str]:
    return [FULL if window is None else SLIDING for window in windows]


def both_dtype_spellings(dtype: torch.dtype) -> dict[str, str]:
    """Return the dtype entries of config.json, in the spellings of transformers 4 and 5."""
    name = str(dtype).removeprefix("torch.")
    return {"dtype": name, "torch_dtype": name}


def _repair_id(
    content: dict[str, Any], key: str, family: str, rows: int, repairs: list[str]
) -> None:
    """Repair a token id. Some sources list several ids where readers accept one; some have ids
    beyond the vocabulary, for which transformers can't build the embedding."""
    given = content.get(key)
    if isinstance(given, list) and given:
        content[key] = given[0]
        repairs.append(f"config.json: {key} is {given}; the export names the first, {given[0]}.")
    found = content.get(key)
    known = isinstance(found, int) and not isinstance(found, bool) and 0 <= found < rows
    if found is not None and not known:
        del content[key]
        repairs.append(f"config.json: {key} is {found!r:.100}, no token's id; left out.")
    # A family's default for an absent key may be beyond a small vocabulary: null says none.
    if content.get(key) is None and (_default(family, key) or 0) >= rows:
        content[key] = None


def _default(family: str, key: str) -> int | None:
    """Return transformers' default of a token id for a family."""
    return getattr(AutoConfig.for_model(family), key, None)


# Values that transformers accepts -----------------------------------------------------------------


def _config_reader(
    written: Mapping[str, Any], repairs: list[str]
) -> Callable[[Mapping[str, Any]], None]:
    """Return a function that raises transformers' error for the written keys plus some others."""

    def read(base: Mapping[str, Any], others: Mapping[str, Any]) -> None:
        AutoConfig.for_model(**copy.deepcopy({**others, **base}))

    reason = _reason(lambda: read(written, {}))
    if reason is None:
        return lambda others: read(written, others)
    repairs.append(
        f"transformers {transformers.__version__} refuses this model's own config.json, the "
        f"source's as well as the export's: {reason} Load the export with a version that took the "
        "source (4.57 did)."
    )
    base = config_without_check(written)
    return lambda others: read(base, others)


def config_without_check(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config that transformers 5 accepts for a model whose heads do not divide the hidden
    size.

    It checks that, though it computes with `head_dim`. Set the number of heads afterwards.
    """
    return {**content, "num_attention_heads": 1}


def config_if_refused(content: Mapping[str, Any]) -> Any:
    """Return transformers' config of a model that it refuses only for its number of heads; else
    None.

    Its computation with that config is the same as without the check.
    """
    if _reason(lambda: AutoConfig.for_model(**copy.deepcopy(dict(content)))) is None:
        return None
    loosened = copy.deepcopy(config_without_check(content))
    if _reason(lambda: AutoConfig.for_model(**loosened)) is not None:
        return None
    config = AutoConfig.for_model(**copy.deepcopy(config_without_check(content)))
    config.num_attention_heads = content.get("num_attention_heads")
    return config


def _accepted(
    content: Mapping[str, Any],
    read: Callable[[Mapping[str, Any]], Any],
    file: str,
    repairs: list[str],
) -> dict[str, Any]:
    """Return the keys that `read` accepts, each tried together with the keys before it."""
    kept: dict[str, Any] = {}
    for key, value in content.items():
        tried = {**kept, key: value}
        reason = _reason(lambda: (json.dumps(value, allow_nan=False), read(tried)))  # noqa: B023
        if reason is None:
            kept = tried
        else:
            repairs.append(f"{file}: the export leaves out {key}={value!r:.60}: {reason}")
    return kept


def _reason(attempt: Callable[[], Any]) -> str | None:
    """Return the reason why an attempt fails, in one line; None if it succeeds."""
    verbosity = hf_logging.get_verbosity()
    hf_logging.set_verbosity_error()
    try:
        attempt()
    except Exception as error:  # libraries raise nearly any exception for untrusted values
        text = " ".join(str(error.__cause__ or error).split()) or type(error).__name__
        return text[:200] + ("" if text.endswith(".") else ".")
    finally:
        hf_logging.set_verbosity(verbosity)
    return None


# generation_config.json ---------------------------------------------------------------------------


def portable_generation_config(
    source: Mapping[str, Any] | None, config: Mapping[str, Any], eos: int
) -> Portable:
    """Return the source's generation settings, with the trained stop token among the stop tokens.

    Args:
        config: config.json of the export.

    Raises:
        CheckpointError: eos_token_id is no token's id.
    """
    file = "generation_config.json"
    repairs: list[str] = []
    dropped = ("_from_model_config", "transformers_version")
    given = {key: value for key, value in (source or {}).items() if key not in dropped}
    for key in IDS:
        if given.get(key) is None and config.get(key) is not None:
            given[key] = config[key]
    stops = token_ids(given, "eos_token_id", file)
    stops = stops if eos in stops else [*stops, eos]
    if given.get("do_sample") is None and any(_samples(given, key) for key in SAMPLING):
        given["do_sample"] = True
        named = ", ".join(key for key in SAMPLING if _samples(given, key))
        repairs.append(f"{file}: the export adds do_sample=true, without which {named} do nothing.")
    # Keys on which others depend come first.
    first = ("do_sample", "num_beams", "use_cache", "return_dict_in_generate")
    ordered = {key: given[key] for key in (*first, *given) if key in given}
    ordered["eos_token_id"] = stops[0] if len(stops) == 1 else stops
    kept = _accepted(ordered, _read_generation, file, repairs)
    return Portable({key: kept[key] for key in (*given, "eos_token_id") if key in kept}, repairs)


def _samples(content: Mapping[str, Any], key: str) -> bool:
    value = content.get(key)
    return value is not None and value != {"top_k": 50, "min_p": None, "top_h": None}.get(key, 1.0)


def _read_generation(content: Mapping[str, Any]) -> None:
    """Raise transformers' error if it can't save these settings or generate with them."""
    for key, value in content.items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if NUMBERS.fullmatch(key) and value is not None and not number:
            raise ValueError("it must be a number.")
        if key == "do_sample" and not isinstance(value, bool | None):
            raise ValueError("it must be true or false.")
        if key in IDS and key != "eos_token_id" and not isinstance(value, int | None):
            raise ValueError("it must be one token's id.")
    GenerationConfig(**copy.deepcopy(dict(content))).validate(strict=True)
