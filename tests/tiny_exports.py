"""Exports of tiny random models of every family, and transformers' logits of their sources.

Other programs read the exports, each in an environment of its own (test_readers.py). Of a wrapper
the export is its text model; the reference is the whole wrapper, asked in text alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from tiny_families import (
    FAMILIES,
    TinyCheckpoint,
    make_checkpoint,
    make_wrapper,
    write_tokenizer,
)

from torchprime.checkpoint.export import export_hf
from torchprime.checkpoint.hf.folder import HfFolder
from torchprime.checkpoint.hf.write import WeightLayout

# vLLM's attention on the CPU has heads of 32 and of some larger sizes.
HEAD = 32
WIDE: dict[str, Any] = {"hidden_size": 4 * HEAD, "max_position_embeddings": 256}
CHANGES: dict[str, dict[str, Any]] = {
    "phi3": {
        "rope_scaling": {
            "type": "longrope",
            "short_factor": [1.0 + i / 10 for i in range(12)],
            "long_factor": [1.0 + i / 4 for i in range(12)],
        }
    }
}
TEXT: dict[str, dict[str, Any]] = {
    "Gemma3": {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 16},
    "Mistral3": {"sliding_window": None},
    "Qwen2_5_VL": {"rope_scaling": {"type": "mrope", "mrope_section": [4, 4, 8]}},
}
# More switches of a family, by the family's name in FAMILIES.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "granite_strong": (
        "granite",
        {
            "embedding_multiplier": 6.0,
            "attention_multiplier": 0.3,
            "residual_multiplier": 0.4,
            "logits_scaling": 3.0,
        },
    ),
    "llama_biases": ("llama_untied", {"attention_bias": True, "mlp_bias": True}),
    "llama_yarn": (
        "llama_untied",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 8.0,
                "original_max_position_embeddings": 32,
            }
        },
    ),
    "qwen2_window": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1},
    ),
    "qwen3_window": (
        "qwen3",
        {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 0},
    ),
    "smollm3_window": (
        "smollm3",
        {
            "use_sliding_window": True,
            "sliding_window": 16,
            "layer_types": ["full_attention", "sliding_attention"],
            "tie_word_embeddings": False,
        },
    ),
}
NEWER = frozenset(("ministral3",))  # than transformers 4.57
EXPORTS = (*FAMILIES, *VARIANTS, *TEXT)
# Longer than every window, and than the context below which phi3's short factors hold.
PROMPTS = [[(7 * i + 3 * i * i) % 300 + 5 for i in range(n)] for n in (41, 37, 40)]
TOKENS = 12


class Source(NamedTuple):
    checkpoint: TinyCheckpoint
    export: Path


def make_source(name: str, work: Path, tokenizer: Path) -> Source:
    """Save a model and export it."""
    folder = work / name
    if name in TEXT:
        text = {**WIDE, "head_dim": HEAD, "vocab_size": 320, **TEXT[name]}
        made = make_wrapper(folder, name, **text)
    else:
        family, more = VARIANTS.get(name, (name, CHANGES.get(name, {})))
        heads = {"head_dim": HEAD} if "head_dim" in FAMILIES[family][1] else {}
        made = make_checkpoint(folder, family, **{**WIDE, **heads, **more})
    hf_folder = HfFolder(
        layout=WeightLayout(made.spec, torch.float32, 10**9),
        config=made.config,
        generation_config=None,
        tokenizer_folder=tokenizer,
        eos_token_id=0,
    )
    out = work / f"{name}-export"
    export_hf(out, hf_folder, card="# card\n", weights=made.reader.weights(made.spec))
    return Source(made, out)


def make_sources(work: Path) -> dict[str, Source]:
    """Save and export a model of every family and wrapper."""
    tokenizer = work / "tokenizer"
    tokenizer.mkdir()
    write_tokenizer(tokenizer)
    return {name: make_source(name, work, tokenizer) for name in EXPORTS}


def load_source(name: str, source: Source) -> Any:
    """Load a source with transformers."""
    kind: Any = transformers.AutoModelForCausalLM
    if name in TEXT:
        kind = getattr(transformers, f"{name}ForConditionalGeneration")
    return kind.from_pretrained(
        source.checkpoint.folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
