"""What a run starts from: a checkpoint's config.json, tokenizer and weights, or an architecture.

Everything is checked here before a device is touched: the architecture is one we compute rightly,
the tokenizer fits the vocabulary, and the weights' names and shapes are exactly the model's.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from torchprime.checkpoint.hf_read import SafetensorsReader, check_names
from torchprime.checkpoint.portable import read_json
from torchprime.checkpoint.source import resolve_pretrained
from torchprime.config.compose import configs_dir
from torchprime.data.tokenizer import Tokenizer, load_tokenizer
from torchprime.errors import CheckpointError
from torchprime.models.architecture import Architecture, architecture_from_hf
from torchprime.models.decoder import CausalLM, initial_tensor

Shape = tuple[int, ...]


@dataclass(frozen=True)
class ModelFiles:
    """The model's description and where its tokenizer lies."""

    folder: Path | None  # of the checkpoint; None when training from scratch
    hf_config: Mapping[str, Any]
    architecture: Architecture
    tokenizer: Tokenizer
    shapes: Mapping[str, Shape]  # of every weight, by Hugging Face name

    @property
    def num_parameters(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes.values())

    def build(self) -> CausalLM:
        """The model without storage."""
        with torch.device("meta"):
            return CausalLM(self.architecture)

    def fingerprint(self) -> str:
        """sha256 of the architecture and of names and shapes of the weights: equal ones, equal
        programs."""
        described = {"architecture": asdict(self.architecture), "shapes": dict(self.shapes)}
        return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()

    def generation_config(self) -> dict[str, Any] | None:
        """The checkpoint's generation_config.json, if it has one."""
        if self.folder is None or not (self.folder / "generation_config.json").is_file():
            return None
        return read_json(self.folder / "generation_config.json")


def find_model(
    *,
    pretrained_model: str | None,
    tokenizer_name: str | None,
    architecture: Mapping[str, Any] | None,
    cache_dir: str | None,
    weights: bool,
) -> ModelFiles:
    """Find the files, read config and tokenizer, and see that they fit each other.

    Raises:
        CheckpointError: missing files, unsupported architecture, vocabularies that differ.
    """
    folder = None
    if pretrained_model is not None:
        folder = resolve_pretrained(pretrained_model, cache_dir=cache_dir, weights=weights)
        hf_config = read_json(folder / "config.json")
        parsed = architecture_from_hf(hf_config, where=str(folder / "config.json"))
    else:
        assert architecture is not None  # the schema has seen to it
        hf_config = architecture
        parsed = architecture_from_hf(hf_config, where="model.architecture")
    tokenizer_folder = folder
    if tokenizer_name is not None:
        tokenizer_folder = resolve_pretrained(tokenizer_name, cache_dir=cache_dir, weights=False)
    assert tokenizer_folder is not None  # the schema has seen to it
    tokenizer = load_tokenizer(tokenizer_folder)
    check_vocabulary(tokenizer, parsed, hf_config)
    with torch.device("meta"):
        shapes = {n: tuple(p.shape) for n, p in CausalLM(parsed).named_parameters()}
    return ModelFiles(folder, hf_config, parsed, tokenizer, shapes)


def find_architecture(
    *, pretrained_model: str | None, architecture: Mapping[str, Any] | None, cache_dir: str | None
) -> tuple[Mapping[str, Any], str]:
    """A model's config.json without its weights, and where it is from: a local folder, a shipped
    option of the group `model`, or else the hub.

    Raises:
        CheckpointError: there is none.
    """
    if pretrained_model is None:
        assert architecture is not None  # the schema has seen to it
        return architecture, "model.architecture"
    shipped = None if Path(pretrained_model).is_dir() else _shipped_option(pretrained_model)
    if shipped is not None:
        return yaml.safe_load(shipped.read_text())["architecture"], f"model={shipped.stem}"
    folder = resolve_pretrained(pretrained_model, cache_dir=cache_dir, weights=False)
    return read_json(folder / "config.json"), str(folder / "config.json")


def _shipped_option(hub_name: str) -> Path | None:
    """The file with the architecture of this hub repository, if one ships."""
    for path in sorted((configs_dir() / "model").glob("*.yaml")):
        option = yaml.safe_load(path.read_text())
        if "architecture" in option and option.get("tokenizer_name") == hub_name:
            return path
    return None


def check_vocabulary(
    tokenizer: Tokenizer, architecture: Architecture, hf_config: Mapping[str, Any]
) -> None:
    """An id past the embedding would be clamped by XLA without a word; and stop tokens must agree.

    A model may have more rows than the tokenizer has tokens (padding to a round number), never
    fewer.
    """
    if tokenizer.max_id >= architecture.vocab_size:
        raise CheckpointError(
            f"The tokenizer in {tokenizer.folder} has ids up to {tokenizer.max_id}, but the "
            f"model's vocab_size is {architecture.vocab_size}. Set model.tokenizer_name to the "
            "tokenizer of this model (or null to use the one beside its weights)."
        )
    stops = hf_config.get("eos_token_id")
    stops = [] if stops is None else stops if isinstance(stops, list) else [stops]
    known = {*stops, *tokenizer.generation_eos_ids}
    if architecture.vocab_size > tokenizer.max_id + 1 + 1024 and tokenizer.eos_id not in known:
        raise CheckpointError(
            f"The tokenizer in {tokenizer.folder} has {tokenizer.vocab_size} tokens and stops with "
            f"id {tokenizer.eos_id}; the model has {architecture.vocab_size} rows and stops with "
            f"{sorted(known) or 'no id'}: they do not belong together. Set model.tokenizer_name to "
            "the model's own tokenizer."
        )


def pretrained_tensors(files: ModelFiles) -> Callable[[str], Tensor]:
    """A function from a weight's name to its tensor, read when asked for.

    Raises:
        CheckpointError: names or shapes that do not fit, all of them listed.
    """
    assert files.folder is not None
    reader = SafetensorsReader(files.folder)
    check_names(files.shapes, reader, tied=files.architecture.tie_word_embeddings)
    return reader.get


def random_tensors(files: ModelFiles, seed: int) -> Callable[[str], Tensor]:
    """A function from a weight's name to its initial value, made when asked for."""

    def tensor_of(name: str) -> Tensor:
        std = files.architecture.initializer_range
        return initial_tensor(name, torch.Size(files.shapes[name]), std, seed)

    return tensor_of
