"""Logits of an adapted model that is not merged, by our own decoder on the CPU."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from torchprime.adapters.apply import apply_adapter, base_name
from torchprime.adapters.spec import AdapterSpec
from torchprime.checkpoint.adapter.merge import TensorOf, base_in_run
from torchprime.checkpoint.adapter.parts import plain_decoder
from torchprime.checkpoint.hf.export_facts import ExportFacts
from torchprime.checkpoint.proof.logits import (
    Logits,
    PromptLogits,
    no_room,
    prompt_ids,
)
from torchprime.models.architecture import architecture_from_hf


def adapted_logits(
    config: Mapping[str, Any],
    base_tensor_of: TensorOf,
    trained: Mapping[str, Tensor],
    spec: AdapterSpec,
    dtype: torch.dtype,
    ids: npt.NDArray[np.int64],
    run_dtype: torch.dtype | None = None,
) -> Logits:
    """Return the logits [B, S, V] that base and adapter compute together, without dropout.

    Args:
        config: the content of config.json.
        base_tensor_of: gives a tensor of the base's files by its name.
        trained: the trained tensors by their names in the adapted model.
        spec: with `base_type` int8 or nf4 the base's layers have their dequantized values.
        dtype: of the computation.
        ids: [B, S], rows without padding.
        run_dtype: of the run that trained the adapter; None is `dtype`.
    """
    model = plain_decoder(config)
    apply_adapter(model, spec)

    def value(name: str, parameter: Tensor) -> Tensor:
        if name in trained:
            return trained[name].to(dtype)
        if not parameter.is_meta:  # the layers' numbers, which only dropout reads
            return parameter
        plain = base_name(name)
        run = run_dtype or dtype
        return base_in_run(plain, base_tensor_of(plain), spec.base_type, run).to(dtype)

    values = {name: value(name, parameter) for name, parameter in model.named_parameters()}
    model.load_state_dict(values, assign=True)
    rows = torch.as_tensor(ids)
    positions = torch.arange(rows.shape[1]).expand_as(rows)
    with torch.no_grad():
        return model.logits(rows, positions, torch.ones_like(rows)).numpy()


def checkpoint_logits(
    facts: ExportFacts,
    config: Mapping[str, Any],
    base_tensor_of: TensorOf,
    trained: Mapping[str, Tensor],
    tokenizer: Path,
) -> PromptLogits | str:
    """Return the logits of a checkpoint's adapter over its base for the prompts of a certificate,
    or the reason why there are none.

    Args:
        facts: of the run, with `facts.adapter`.
        tokenizer: the folder of tokenizer.json.

    `adapted_logits` describes the other arguments.
    """
    assert facts.adapter is not None
    if reason := no_room(facts.layout.num_parameters, facts.dtype):
        return reason
    ids = prompt_ids(tokenizer, architecture_from_hf(config))
    logits = adapted_logits(config, base_tensor_of, trained, facts.adapter, facts.dtype, ids)
    return PromptLogits(ids, logits, "torchprime's decoder on the CPU, from the checkpoint")
