"""The witness' adapter: PEFT's model over transformers', from the same first values as ours.

PEFT draws A by torch's global generator, so A is copied from the run that we would start. B, the
norms of DoRA and modules that are trained whole have PEFT's own first values. PEFT has neither int8
per output nor our NF4 on a CPU, so a quantized base holds its dequantized values.
"""

from __future__ import annotations

from typing import Any

import torch

from torchprime.adapters.peft_format import config_of, file_name
from torchprime.adapters.spec import AdapterSpec
from torchprime.checkpoint.adapter.merge import base_in_run
from torchprime.checkpoint.adapter.parts import adapter_parts
from torchprime.config.checks import refuse
from torchprime.config.schema import TrainConfig
from torchprime.training.setup.adapter import AdaptedTensors
from torchprime.training.setup.model_files import ModelFiles, pretrained_tensors

ADAPTER = "adapter"  # PEFT's folder in the run's, after the last step


def check_adapter(c: TrainConfig) -> None:
    """Refuse an adapter that PEFT trains differently.

    Raises:
        ConfigError: dropout, whose masks PEFT draws from torch's generator.
    """
    if c.adapter.enabled and c.adapter.dropout:
        refuse(
            "adapter.dropout",
            c.adapter.dropout,
            "0: PEFT draws other masks than ours",
            "Set adapter.dropout=0 in both runs.",
        )


def adapted(model: Any, files: ModelFiles, dtype: torch.dtype, seed: int) -> Any:
    """Return the model with the run's adapter, by PEFT; unchanged if all weights are trained.

    Args:
        model: transformers', with the base's weights.
        files: of the run.
        dtype: of the run.
        seed: of the run.
    """
    if files.adapter is None:
        return model
    # late: only adapters need it
    import peft

    spec = files.adapter.spec
    parts = adapter_parts(files.hf_config, spec)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(base_in_run(name, weight, spec.base_type, dtype))
    given: dict[str, Any] = config_of(
        spec, base=str(files.folder), targets=parts.targets, whole=parts.whole, tied=parts.tied
    )
    given["inference_mode"] = False
    config = peft.LoraConfig(**given)
    made = peft.get_peft_model(model, config, autocast_adapter_dtype=False)
    _copy_first_values(made, files, spec, dtype, seed)
    return made


def _copy_first_values(
    model: Any, files: ModelFiles, spec: AdapterSpec, dtype: torch.dtype, seed: int
) -> None:
    """Give A the values that it has at the start of our run."""
    base = pretrained_tensors(files, dtype)
    ours = files.build(dtype)
    values = AdaptedTensors(ours, spec, base, trained=None, seed=seed, dtype=dtype)
    theirs = dict(model.named_parameters())
    with torch.no_grad():
        for name in values.trained:
            if name.endswith("lora_A.weight"):
                theirs[file_name(name).replace("lora_A.", "lora_A.default.")].copy_(values(name))
