"""Mapping of tensor names in files to those of a causal language model.

Programs save the names of their wrappers: `module.` (data parallel), `_orig_mod.` (torch.compile),
`base_model.model.` (PEFT). A decoder saved alone has no `model.` prefix. Such files are read. Files
with anything but the weights of one plain model are refused, with the way to fix it: an adapter,
quantized values. Of a model with a text model inside (families.WRAPPERS) the text model is read;
its names have a prefix, in two spellings; those of Qwen2.5-VL may have none:

    language_model.model.layers.0...   language_model.lm_head.weight   transformers up to 4.51, hub
    model.language_model.layers.0...   lm_head.weight                  later versions
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

import torch

from torchprime.models.unsupported import DEQUANTIZE, TAKE_TEXT_PART

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
WRAPPERS = ("module.", "_orig_mod.", "base_model.model.")
ADAPTER = re.compile(r"\.(lora_(A|B|magnitude_vector|embedding_\w)|base_layer|modules_to_save)\b")
QUANTIZED = re.compile(
    r"\.(qweight|qzeros|g_idx|scales|SCB|absmax|quant_map|quant_state\b.*|nested_\w+"
    r"|weight_(scale|scale_inv|packed|shape|zero_point|format)|input_scale)$"
)
TEXT_PART = re.compile(r"^(model\.)?(language_model|text_model)\.")
INNER = (
    ("language_model.model.", "model."),
    ("language_model.lm_head.", "lm_head."),
    ("model.language_model.", "model."),
    ("lm_head.", "lm_head."),
    # Beside `visual.`, without a prefix of their own.
    *((f"model.{part}.", f"model.{part}.") for part in ("embed_tokens", "layers", "norm")),
)
# The text model inside a wrapper that transformers has loaded, from version 4.52 on.
LOADED = ("model.", "model.language_model.")
PLAIN_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MERGE = (
    'python -c "from peft import AutoPeftModelForCausalLM as M; '
    "M.from_pretrained('OLD', dtype='auto').merge_and_unload().save_pretrained('NEW')\", then copy "
    "the base's tokenizer files to NEW"
)


def public_names(stored: Iterable[str]) -> dict[str, str]:
    """Map the names in files to those of a causal language model."""
    names = _unwrapped(stored)
    if not any(public.startswith("model.") for public in names.values()):
        names = {n: public if public == HEAD else f"model.{public}" for n, public in names.items()}
    return names


def inner_names(stored: Iterable[str]) -> dict[str, str]:
    """Map the names of a wrapper's text model to those of a causal language model. Names of its
    other parts, such as a vision tower, are left out."""
    found = {}
    for name, public in _unwrapped(stored).items():
        pair = next((pair for pair in INNER if public.startswith(pair[0])), None)
        if pair is not None:
            found[name] = pair[1] + public.removeprefix(pair[0])
    return found


def in_loaded(name: str, *, wrapper: bool) -> str:
    """Return the name of a text model's tensor or module in the base that transformers has loaded,
    which is its name in PEFT, too.

    Args:
        wrapper: the base has the text model inside; else it is the text model.
    """
    plain, inside = LOADED
    if not wrapper or not name.startswith(plain):
        return name
    return inside + name.removeprefix(plain)


def of_text_model(name: str) -> bool:
    """Return True for a name that only the text model inside a wrapper has."""
    return TEXT_PART.match(name) is not None


def _unwrapped(stored: Iterable[str]) -> dict[str, str]:
    """Take a wrapper off where every name has it; `_orig_mod.` stands inside of names, too."""
    names = {name: name.replace("._orig_mod.", ".") for name in stored}
    while wrapper := _shared_wrapper(names.values()):
        names = {name: public.removeprefix(wrapper) for name, public in names.items()}
    return names


def _shared_wrapper(names: Iterable[str]) -> str | None:
    names = list(names)
    found = (w for w in WRAPPERS if names and all(name.startswith(w) for name in names))
    return next(found, None)


def foreign(names: Mapping[str, torch.dtype], expected: Iterable[str]) -> str | None:
    """Return the kind of files that are not plain weights, and how to convert them; else None.

    Args:
        names: of all tensors, with their dtypes.
        expected: the names of the model's weights.
    """
    if some := _matching(ADAPTER, names):
        return f"hold a PEFT adapter beside its base ({some}), not merged. Merge it: {MERGE}."
    if some := _matching(QUANTIZED, names):
        return f"hold quantized weights ({some}), which cannot be trained: {DEQUANTIZE}."
    if some := _matching(TEXT_PART, names):
        return (
            f"hold a text model inside of a larger one ({some}). Only a text model can be trained: "
            f"{TAKE_TEXT_PART}."
        )
    strange = [name for name in expected if names.get(name, torch.float32) not in PLAIN_DTYPES]
    if strange:
        kind = str(names[strange[0]]).removeprefix("torch.")
        return (
            f"hold {len(strange)} weights as {kind} ({_some(strange)}) and config.json has no "
            f"quantization_config, so nobody can tell their values: {DEQUANTIZE}."
        )
    return None


def _matching(pattern: re.Pattern[str], names: Iterable[str]) -> str:
    return _some([name for name in names if pattern.search(name)])


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 2:,} more" if len(names) > 2 else ""
    return ", ".join(f"{name:.120}" for name in names[:2]) + more
