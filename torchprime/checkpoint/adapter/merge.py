"""The merge of an adapter into its base, one tensor at a time.

A merged model is a plain model: it needs no PEFT, and computes what base and adapter compute
together, but for the rounding of the merged weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from torchprime.adapters import int8, nf4
from torchprime.adapters.lora import merged_weight
from torchprime.adapters.spec import AdapterSpec, BaseType
from torchprime.checkpoint.hf.weight_names import EMBEDDING, HEAD
from torchprime.errors import CheckpointError

TensorOf = Callable[[str], Tensor]


def base_in_run(name: str, tensor: Tensor, base_type: BaseType, dtype: torch.dtype) -> Tensor:
    """Return a frozen tensor of the base with the values that a run computes with.

    Args:
        name: in the plain model.
        tensor: from the base's files.
        base_type: the storage of the frozen linear layers in the run (`quantize_base`): their
            weights are quantized and dequantized as there.
        dtype: of the run.
    """
    tensor = tensor.to(dtype)
    # All other matrices of a decoder are linear layers' weights.
    if tensor.dim() != 2 or name in (EMBEDDING, HEAD):
        return tensor
    if base_type == "int8":
        return int8.dequantize(int8.quantize(tensor), dtype)
    if base_type == "nf4":
        return nf4.dequantize(nf4.quantize(tensor), dtype)
    return tensor


def require_blocks(shapes: Mapping[str, tuple[int, ...]], base_type: BaseType) -> None:
    """Raise a CheckpointError if a model's linear layers can't be stored in the base's type.

    Args:
        shapes: of the model's weights, by name.
    """
    if base_type != "nf4":
        return
    for name, shape in shapes.items():
        if len(shape) == 2 and name not in (EMBEDDING, HEAD) and shape[1] % nf4.BLOCK:
            raise CheckpointError(
                f"--base-dtype: given nf4, whose blocks have {nf4.BLOCK} inputs, but {name} has "
                f"{shape[1]} inputs, so no run had this base in nf4. Expected int8 or run."
            )


def merged_tensors(
    base_tensor_of: TensorOf,
    trained: Mapping[str, Tensor],
    spec: AdapterSpec,
    dtype: torch.dtype,
    *,
    run_dtype: torch.dtype | None = None,
) -> TensorOf:
    """Return the merged model's tensors as a function of their names; nothing is computed before.

    Each call reads one tensor of the base and keeps none, so memory holds one at a time.

    Args:
        base_tensor_of: gives a tensor of the base's files by its name.
        trained: the trained tensors by their names in the adapted model.
        spec: `spec.base_type` says which values of the base the adapter is merged into: `run` the
            original ones; `int8` or `nf4` the dequantized ones, which a quantized run trained on.
        dtype: of the merged tensors; each is computed in fp32 and rounded once.
        run_dtype: of the run that trained the adapter; None is `dtype`.
    """
    run = run_dtype or dtype

    def tensor_of(name: str) -> Tensor:
        if name in trained:  # a module that was trained whole
            return trained[name].to(dtype)
        base = base_in_run(name, base_tensor_of(name), spec.base_type, run)
        module, _, last = name.rpartition(".")
        if last != "weight" or f"{module}.lora_A.weight" not in trained:
            return base.to(dtype)
        a, b = (trained[f"{module}.lora_{part}.weight"] for part in "AB")
        magnitude = trained[f"{module}.lora_magnitude_vector"] if spec.dora else None
        return merged_weight(base.float(), a, b, spec.scale, magnitude).to(dtype)

    return tensor_of
