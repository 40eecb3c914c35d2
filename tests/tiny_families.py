"""Tiny random checkpoints of every family, saved by transformers itself.

Every family has its switches on: rope scaling, tied and untied embeddings, biases, q/k norms,
windows, layers without rotation, multipliers.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from tiny_llama import SHAPE
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

from torchprime.checkpoint.hf.read import SafetensorsReader

SIZES = dict(
    **SHAPE,
    vocab_size=320,
    max_position_embeddings=128,
    bos_token_id=None,
    eos_token_id=0,
    pad_token_id=None,
)
LLAMA3_ROPE = dict(
    rope_type="llama3",
    rope_theta=500_000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=32,
)
FAMILIES = {
    "llama_tied": ("Llama", dict(rope_parameters=LLAMA3_ROPE, tie_word_embeddings=True)),
    "llama_untied": (
        "Llama",
        dict(rope_parameters=dict(rope_type="linear", rope_theta=3e4, factor=2.0)),
    ),
    "qwen2": ("Qwen2", dict(tie_word_embeddings=True)),
    "qwen3": (
        "Qwen3",
        dict(head_dim=16, rope_parameters=dict(rope_type="default", rope_theta=1e6)),
    ),
    "mistral": ("Mistral", dict(sliding_window=16)),
    "ministral": (
        "Ministral",
        dict(head_dim=16, sliding_window=16, layer_types=["full_attention", "sliding_attention"]),
    ),
    "ministral3": (
        "Ministral3",
        dict(
            head_dim=16,
            rope_parameters=dict(
                rope_type="yarn",
                rope_theta=1e4,
                factor=4.0,
                original_max_position_embeddings=32,
                beta_fast=32.0,
                beta_slow=1.0,
                truncate=True,
                llama_4_scaling_beta=0.2,
            ),
        ),
    ),
    "glm4": ("Glm4", dict(head_dim=16, partial_rotary_factor=0.5)),
    "granite": (
        "Granite",
        dict(
            embedding_multiplier=12.0,
            attention_multiplier=0.0078125,
            residual_multiplier=0.22,
            logits_scaling=16.0,
        ),
    ),
    "smollm3": ("SmolLM3", dict(no_rope_layers=[1, 0])),
    "phi3": (
        "Phi3",
        dict(
            partial_rotary_factor=0.75,
            original_max_position_embeddings=32,
            rope_scaling=dict(
                type="longrope", short_factor=[1.0, 1.1, 1.2], long_factor=[1.0, 2.0, 4.0]
            ),
        ),
    ),
    "phi3_window": ("Phi3", dict(sliding_window=16)),
    "gemma2": (
        "Gemma2",
        dict(
            head_dim=16,
            query_pre_attn_scalar=24,
            sliding_window=16,
            attn_logit_softcapping=5.0,
            final_logit_softcapping=3.0,
        ),
    ),
    "gemma3": (
        "Gemma3",
        dict(
            head_dim=16,
            query_pre_attn_scalar=16,
            sliding_window=16,
            layer_types=["sliding_attention", "full_attention"],
            rope_parameters=dict(
                full_attention=dict(rope_type="linear", rope_theta=1e6, factor=8.0),
                sliding_attention=dict(rope_type="default", rope_theta=1e4),
            ),
        ),
    ),
    "olmo2": ("Olmo2", dict()),
    "olmo3": (
        "Olmo3",
        dict(
            sliding_window=16,
            layer_types=["sliding_attention", "full_attention"],
            rope_parameters=dict(
                full_attention=dict(
                    rope_type="yarn",
                    rope_theta=5e5,
                    factor=4.0,
                    original_max_position_embeddings=32,
                    beta_fast=32.0,
                    beta_slow=1.0,
                    attention_factor=1.2,
                    truncate=True,
                ),
                sliding_attention=dict(rope_type="default", rope_theta=5e5),
            ),
        ),
    ),
}


@dataclass(frozen=True)
class TinyCheckpoint:
    folder: Path
    config: dict[str, Any]
    reader: SafetensorsReader
    spec: dict[str, tuple[int, ...]]


def make_checkpoint(folder: Path, family: str, **changes: Any) -> TinyCheckpoint:
    """A random model of a family."""
    name, switches = FAMILIES[family]
    model_class = getattr(transformers, f"{name}ForCausalLM")
    config = model_class.config_class(**{**SIZES, **switches, **changes})
    torch.manual_seed(7)
    return _saved(folder, model_class(config))


def _saved(folder: Path, model: Any) -> TinyCheckpoint:
    with torch.no_grad():
        for parameter in model.parameters():  # no ones and zeros: a swapped norm or bias must show
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    return open_checkpoint(folder)


def open_checkpoint(folder: Path) -> TinyCheckpoint:
    reader = SafetensorsReader(folder)
    config = json.loads((folder / "config.json").read_text())
    return TinyCheckpoint(folder, config, reader, {n: s for n, (s, _) in reader.names().items()})


def make_wrapper(folder: Path, name: str, **text: Any) -> TinyCheckpoint:
    """A random model with a tower for images and a text model inside, saved by transformers.

    Args:
        name: of the class, without ForConditionalGeneration: Gemma3, Mistral3 or Qwen2_5_VL.
        text: changes to the text model's config.
    """
    shape = dict(SHAPE, num_key_value_heads=1, vocab_size=64, head_dim=8, pad_token_id=None)
    vision = {k: v for k, v in SHAPE.items() if k != "num_key_value_heads"}
    vision |= {"image_size": 28, "patch_size": 14}
    tied = name == "Gemma3"
    if name == "Qwen2_5_VL":
        shape |= {"rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}}
        shape |= {"bos_token_id": None, "eos_token_id": 2}
        vision = dict(depth=1, hidden_size=16, intermediate_size=16, num_heads=2)
        vision |= {"out_hidden_size": 32, "fullatt_block_indexes": [0]}
    config = getattr(transformers, f"{name}Config")(
        text_config={**shape, "tie_word_embeddings": tied, **text},
        vision_config=vision,
        tie_word_embeddings=tied,
    )
    return _saved(folder, getattr(transformers, f"{name}ForConditionalGeneration")(config))


IMAGE_TOKENS = ("<start_of_image>", "<end_of_image>", "<image_soft_token>")


def write_processor(folder: Path) -> Any:
    """Give a Gemma 3 with images, and a tokenizer with IMAGE_TOKENS, the processor of images."""
    names = dict(zip(("boi_token", "eoi_token", "image_token"), IMAGE_TOKENS, strict=True))
    tokenizer: Any = transformers.PreTrainedTokenizerFast.from_pretrained(
        folder, extra_special_tokens=names
    )
    processor = transformers.Gemma3Processor(
        Gemma3ImageProcessorPil(size={"height": 28, "width": 28}),
        tokenizer,
        chat_template="{% for m in messages %}{{ m['content'] }}{% endfor %}",
        image_seq_length=4,
    )
    processor.save_pretrained(folder)
    path = folder / "config.json"
    ids = {f"{name}_index": tokenizer.convert_tokens_to_ids(t) for name, t in names.items()}
    path.write_text(json.dumps({**json.loads(path.read_text()), **ids, "mm_tokens_per_image": 4}))
    return processor


def write_tokenizer(folder: Path) -> Path:
    """A byte-level BPE that keeps numbers whole, unlike Qwen's, which cuts them into digits."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|end|>", "<|other|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(
        ["Question: Tom has 12 apples and 345. Answer: the end"] * 9, trainer
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "TokenizersBackend",
        "eos_token": "<|end|>",
        "backend": "tokenizers",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder
