"""One process of a native gloo run of torchtpu_case.py: torchrun torchtpu_native.py OUT WAY."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

os.environ["USE_TORCH_XLA"] = "0"

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torchtpu_case import LENGTH, LR, STEPS, make_batch, make_case  # noqa: E402

from torchprime.torch_native.backend import NativeBackend  # noqa: E402
from torchprime.torch_native.runtime import stop_processes  # noqa: E402


def main(out: Path, way: dict) -> None:
    torch.set_num_threads(1)
    case = make_case(way)
    backend = NativeBackend(way["mesh"], {}, full_precision=True)
    start = {name: value.clone() for name, value in case.start.items()}
    backend.place(case.model, case.table, start.__getitem__, torch.float32)
    backend.prepare_training(case.optimizer, case.options)
    accumulation, numbers = case.options.gradient_accumulation_steps, []
    for step in range(STEPS):
        batch = backend.put(make_batch(step, way.get("length", LENGTH)), accumulation)
        found = backend.read(backend.train_step(batch, LR))
        numbers.append([found.loss, found.grad_norm])
    weights = {name: weight.clone() for name, weight in backend.weights()}
    if dist.get_rank() == 0:
        torch.save({"numbers": numbers, "weights": weights}, out)
    stop_processes()


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
