"""A process that measures what a forward and backward pass of the native backend holds.

torchrun --nproc_per_node=1 memory_worker.py OUT '[{"argv": [...], "architecture": {...}, ...}]'
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ["USE_TORCH_XLA"] = "0"

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker  # noqa: E402

from torchprime.config.compose import compose_config  # noqa: E402
from torchprime.data.blocks.batch import Batch  # noqa: E402
from torchprime.models.architecture import architecture_from_hf  # noqa: E402
from torchprime.torch_native.backend import NativeBackend  # noqa: E402
from torchprime.torch_native.runtime import stop_processes  # noqa: E402
from torchprime.training.setup.adapter import build_model  # noqa: E402
from torchprime.training.setup.recipe import (  # noqa: E402
    adapter_of,
    checked_table,
    optimizer_of,
    step_options,
)


def measure(argv: list[str], architecture: dict[str, Any]) -> dict[str, int]:
    """Bytes of weights, state and gradients, and of everything else at the fullest moment."""
    config = compose_config(argv)
    dtype = getattr(torch, config.torch_dtype)
    model = build_model(architecture_from_hf(architecture), adapter_of(config), dtype)
    table, _ = checked_table(config, model)
    backend = NativeBackend({}, {}, remat=config.remat, full_precision=True)
    shapes = {name: (p.shape, p.dtype) for name, p in model.named_parameters()}
    backend.place(model, table, lambda name: filled(*shapes[name]), dtype)
    backend.prepare_training(optimizer_of(config), step_options(config, 1))
    size, rows = config.dataset.block_size, config.task.global_batch_size
    ids = np.zeros((rows, size), np.int32)
    batch = Batch(ids, ids, np.ones((rows, size), np.float32), ids, ids + 1)
    fields = [field[0] for field in backend.put(batch, 1)]
    tracker: Any = FSDPMemTracker(backend.root)
    tracker.track_inputs(tuple(fields))
    with tracker:
        backend.root(*fields).loss_sum.backward()
    [peak] = tracker.get_tracker_snapshot("peak").values()
    kinds = {kind.value if hasattr(kind, "value") else kind: size for kind, size in peak.items()}
    trained = [p for p in backend.model.parameters() if p.requires_grad]
    own = {state.weight.data_ptr() for state in backend.state.parameters.values()}
    return {
        "weights": sum(p.numel() * p.element_size() for p in trained),
        "state": sum(
            t.numel() * t.element_size()
            for t in backend.state.tensors()
            if t.data_ptr() not in own and t.dim()
        ),
        "gradients": sum(
            p.grad.numel() * p.grad.element_size() for p in trained if p.grad is not None
        ),
        **{f"peak_{kind}": size for kind, size in kinds.items()},
    }


def filled(shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    if not dtype.is_floating_point:
        return torch.zeros(shape, dtype=dtype)
    return torch.full(shape, 0.01, dtype=dtype)


def main(out: Path, cases: list[dict[str, Any]]) -> None:
    torch.set_num_threads(1)
    measured = [measure(**case) for case in cases]
    out.write_text(json.dumps(measured))
    stop_processes()


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
