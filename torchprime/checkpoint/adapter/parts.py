"""The parts of a model that an adapter adds or trains, by name and shape, without weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from torchprime.adapters.apply import apply_adapter, trainable
from torchprime.adapters.spec import AdapterSpec
from torchprime.adapters.targets import trained_modules
from torchprime.models.architecture import architecture_from_hf
from torchprime.models.decoder import CausalLM


class AdapterParts(NamedTuple):
    """The parts of a model under an adapter.

    Attributes:
        targets: names of the adapted layers.
        whole: names of the modules that are trained whole.
        shapes: of the trained tensors, by their names in the adapted model.
        tied: the output projection is the embedding.
    """

    targets: tuple[str, ...]
    whole: tuple[str, ...]
    shapes: dict[str, tuple[int, ...]]
    tied: bool


def plain_decoder(config: Mapping[str, Any]) -> CausalLM:
    """Return the decoder of a config.json without storage."""
    with torch.device("meta"):
        return CausalLM(architecture_from_hf(config))


def adapter_parts(config: Mapping[str, Any], spec: AdapterSpec) -> AdapterParts:
    """Return the parts that the adapter of this description has in the model of a config.json.

    Raises:
        ConfigError: the description does not fit the model.
        CheckpointError: the config is of no model that this project has.
    """
    model = plain_decoder(config)
    whole = trained_modules(model, spec.modules_to_train)
    targets = apply_adapter(model, spec)
    shapes = {name: tuple(p.shape) for name, p in trainable(model).items()}
    return AdapterParts(tuple(targets), tuple(whole), shapes, model.lm_head is None)
