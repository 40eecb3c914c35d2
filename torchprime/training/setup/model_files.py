"""The model of a run: a checkpoint's config.json, tokenizer and weights, or an architecture.

Everything is checked here before a device is used: the architecture is supported,
the tokenizer fits the vocabulary (vocabulary.py), and the weights' names and shapes are exactly the
model's.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from torchprime.checkpoint.hf.read import SafetensorsReader, check_names
from torchprime.checkpoint.hf.source import resolve_pretrained
from torchprime.checkpoint.hf.weight_names import EMBEDDING, HEAD
from torchprime.checkpoint.hf.whole import Parts
from torchprime.checkpoint.hf.write import hash_of_all, weight_hashes
from torchprime.config.compose import configs_dir
from torchprime.data.tokenizer.load import Tokenizer
from torchprime.files.json_files import read_json, read_json_if_there
from torchprime.models.architecture import Architecture, architecture_from_hf
from torchprime.models.decoder import CausalLM, initial_tensor
from torchprime.models.families import text_part
from torchprime.models.new_rows import NewRows
from torchprime.training.optim.groups import Group, freeze_groups
from torchprime.training.setup.adapter import Adapter, build_model
from torchprime.training.setup.vocabulary import Vocabulary, VocabularyRequest, fit_vocabulary

Shape = tuple[int, ...]


@dataclass(frozen=True)
class ModelFiles:
    """A model's description and the place of its tokenizer."""

    folder: Path | None  # of the checkpoint; None when training from scratch
    hf_config: Mapping[str, Any]
    architecture: Architecture
    tokenizer: Tokenizer
    shapes: Mapping[str, Shape]  # of every weight but an adapter's, by Hugging Face name
    vocabulary: Vocabulary | None = None  # if the config changes the vocabulary
    adapter: Adapter | None = None  # None: all weights are trained
    groups: tuple[Group, ...] = ()  # of parameters; some may be frozen
    parts: Parts = "text"  # of a wrapper that are exported

    @property
    def new_rows(self) -> NewRows | None:
        """Rows of the embeddings that the checkpoint does not have, or not trained."""
        return self.vocabulary and self.vocabulary.rows

    @property
    def num_parameters(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes.values())

    @cached_property
    def wrapper(self) -> str | None:
        """The model_type of a larger model whose text model is trained; None: the model is one."""
        config = {} if self.folder is None else read_json(self.folder / "config.json")
        return None if text_part(config) is config else str(config["model_type"])

    def left_out(self) -> str | None:
        """Return a line on the parts of a larger model that training leaves out, if there are
        some."""
        if self.folder is None or self.wrapper is None:
            return None
        count = SafetensorsReader(self.folder).left_out
        start, family = f"model_type {self.wrapper}: its text model is", self.architecture.family
        if self.adapter is not None and self.adapter.form == "adapter":
            return f"{start} adapted; the adapter is one of the whole base"
        if self.parts == "all":
            return (
                f"{start} trained, as {family}; the export is the whole model, with the {count:,} "
                "weights of its other parts as in the base"
            )
        return (
            f"{start} trained and exported, as {family}; the {count:,} weights of its other parts "
            "are left out (export.parts=all exports them too, as in the base)"
        )

    def build(self, dtype: torch.dtype) -> CausalLM:
        """Return the model without storage, with its adapter and frozen weights; its weights are of
        type dtype.

        Raises:
            ConfigError: an adapter or groups of parameters that do not fit the model.
        """
        model = build_model(self.architecture, self.adapter, dtype)
        freeze_groups(model, self.groups)
        return model

    def fingerprint(self) -> str:
        """Return the sha256 of the architecture, the weights' names and shapes and their new rows:
        equal hashes, equal programs."""
        return self._fingerprint(self.architecture.described())

    def older_fingerprint(self) -> str:
        """Return the fingerprint that version 0.1.0 gave this model.

        That version recorded the context in every rope; only `llama3` uses it.
        """
        described = self.architecture.described()
        rope = described.get("rope")
        if rope is not None and rope["kind"] != "llama3":
            rope["original_max_position"] = self.architecture.max_position_embeddings
        return self._fingerprint(described)

    def _fingerprint(self, architecture: dict[str, Any]) -> str:
        described = {"architecture": architecture, "shapes": dict(self.shapes)}
        if self.new_rows is not None:
            described["new_rows"] = asdict(self.new_rows)
        return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()

    def base_fingerprint(self) -> str:
        """Return one hash of all weights in the checkpoint's folder, however they are split into
        files: that of the check "weights" in an export's certificate. It reads them all."""
        assert self.folder is not None
        return hash_of_all(weight_hashes(SafetensorsReader(self.folder)))

    def generation_config(self) -> dict[str, Any] | None:
        """Return the checkpoint's generation_config.json, if it has one."""
        if self.folder is None:
            return None
        return read_json_if_there(self.folder / "generation_config.json") or None


def find_model(
    *,
    pretrained_model: str | None,
    tokenizer_name: str | None,
    architecture: Mapping[str, Any] | None,
    cache_dir: str | None,
    weights: bool,
    vocabulary: VocabularyRequest | None = None,
) -> ModelFiles:
    """Find the files, read config and tokenizer, and check that they fit each other.

    Args:
        weights: whether the weights are needed, too.
        vocabulary: the request for it; None uses tokenizer and checkpoint unchanged.

    Raises:
        CheckpointError: missing files, unsupported architecture, vocabularies that differ.
    """
    folder = None
    if pretrained_model is not None:
        folder = resolve_pretrained(pretrained_model, cache_dir=cache_dir, weights=weights)
        hf_config = text_part(read_json(folder / "config.json"))
        parsed = architecture_from_hf(hf_config, where=str(folder / "config.json"))
    else:
        assert architecture is not None  # the schema guarantees it
        hf_config = architecture
        parsed = architecture_from_hf(hf_config, where="model.architecture")
    tokenizer_folder = folder
    if tokenizer_name is not None:
        tokenizer_folder = resolve_pretrained(tokenizer_name, cache_dir=cache_dir, weights=False)
    assert tokenizer_folder is not None  # the schema guarantees it
    fitted = fit_vocabulary(tokenizer_folder, folder, parsed, hf_config, vocabulary)
    if fitted.rows != parsed.vocab_size:
        hf_config = {**hf_config, "vocab_size": fitted.rows}
        parsed = replace(parsed, vocab_size=fitted.rows)
    shapes = _shapes(parsed)
    return ModelFiles(folder, hf_config, parsed, fitted.tokenizer, shapes, fitted.vocabulary)


def _shapes(architecture: Architecture) -> dict[str, Shape]:
    model = build_model(architecture, None, torch.float32)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def find_architecture(
    *,
    pretrained_model: str | None,
    architecture: Mapping[str, Any] | None,
    cache_dir: str | None,
    tokenizer_name: str | None = None,
    vocabulary: VocabularyRequest | None = None,
) -> tuple[Mapping[str, Any], str]:
    """Return a model's config.json without its weights, and its origin: a local folder, a shipped
    option of the group `model`, or else the hub.

    Args:
        tokenizer_name: of the tokenizer, if it is another than the model's own; only read if the
            vocabulary depends on it.
        vocabulary: the request for it; None uses vocab_size unchanged.

    Raises:
        CheckpointError: there is none; or the vocabulary needs a tokenizer that is not local.
    """
    folder, config, where = _described(pretrained_model, architecture, cache_dir)
    if vocabulary is None or vocabulary.method is None:
        return config, where
    name = tokenizer_name or pretrained_model
    assert name is not None  # the schema guarantees it
    tokenizer_folder = resolve_pretrained(name, cache_dir=cache_dir, weights=False)
    parsed = architecture_from_hf(config, where=where)
    fitted = fit_vocabulary(tokenizer_folder, folder, parsed, config, vocabulary)
    return {**config, "vocab_size": fitted.rows}, f"{where}, {fitted.rows:,} rows of vocabulary"


def _described(
    pretrained_model: str | None, architecture: Mapping[str, Any] | None, cache_dir: str | None
) -> tuple[Path | None, Mapping[str, Any], str]:
    """Return a local checkpoint's folder, its config.json, and the origin of that."""
    if pretrained_model is None:
        assert architecture is not None  # the schema guarantees it
        return None, architecture, "model.architecture"
    shipped = None if Path(pretrained_model).is_dir() else _shipped_option(pretrained_model)
    if shipped is not None:
        config = yaml.safe_load(shipped.read_text())["architecture"]
        return None, config, f"model={shipped.stem}"
    folder = resolve_pretrained(pretrained_model, cache_dir=cache_dir, weights=False)
    config = text_part(read_json(folder / "config.json"))
    return folder, config, str(folder / "config.json")


def _shipped_option(hub_name: str) -> Path | None:
    """Return the file with the architecture of this hub repository, if it is shipped."""
    for path in sorted((configs_dir() / "model").glob("*.yaml")):
        option = yaml.safe_load(path.read_text()) or {}  # only comments: nothing to add
        if "architecture" in option and option.get("tokenizer_name") == hub_name:
            return path
    return None


def pretrained_tensors(files: ModelFiles, dtype: torch.dtype) -> Callable[[str], Tensor]:
    """Return a function from a weight's name to its tensor, which is read on each call.

    Args:
        dtype: of the model. Only a weight that gets new rows comes in it, in memory of its own; the
            others are views of the mapped files.

    Raises:
        CheckpointError: names or shapes that do not fit, all of them listed.
    """
    assert files.folder is not None
    reader = SafetensorsReader(files.folder)
    rows = files.new_rows
    expected = files.shapes
    if rows is not None:
        expected = _shapes(replace(files.architecture, vocab_size=rows.before))
    check_names(expected, reader, tied=files.architecture.tie_word_embeddings)
    if rows is None:
        return reader.get

    def tensor_of(name: str) -> Tensor:
        tensor = reader.get(name)
        return rows.resized(name, tensor, dtype) if name in (EMBEDDING, HEAD) else tensor

    return tensor_of


def random_tensors(files: ModelFiles, seed: int) -> Callable[[str], Tensor]:
    """Return a function from a weight's name to its initial value, which is computed on each call.

    Rows of new tokens are random like the others, because there are no trained rows to take means
    of.
    """
    rows = files.new_rows

    def tensor_of(name: str) -> Tensor:
        std = files.architecture.initializer_range
        shape, norm = torch.Size(files.shapes[name]), files.architecture.norm
        tensor = initial_tensor(name, shape, std, seed, norm=norm)
        if rows is not None and rows.method == "zeros" and name in (EMBEDDING, HEAD):
            tensor[rows.made] = 0
        return tensor

    return tensor_of
