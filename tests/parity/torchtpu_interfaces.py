"""TorchTPU's interfaces that only a run on chips calls, as far as they can be seen without one."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.distributed as dist

from torchprime.torch_native.chips import tpu_client
from torchprime.torch_native.tpu.torchtpu import DEVICE, torch_tpu

native = torch_tpu().native
tpu: Any = getattr(torch, DEVICE)  # only there once TorchTPU is imported
found = torch.accelerator.current_accelerator()
assert found is not None and found.type == DEVICE
for names, module in (
    (("compile_mlir", "parse_mlir_text", "execute"), native),
    (("synchronize", "max_memory_allocated"), torch.accelerator),
    (("get_device_name",), tpu),
):
    assert all(callable(getattr(module, name, None)) for name in names), names
inspect.signature(tpu.distributed.topology_aware_mesh).bind((1, 4, 2))
assert hasattr(tpu_client.ProfilerActivity, "PrivateUse1")
assert "tpu_dist" in dist.Backend.backend_list
