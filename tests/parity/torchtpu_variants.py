"""Steps of every kind, lowered by TorchTPU and run by XLA's CPU client.

    torchtpu_variants.py OUT

OUT gets the numbers and weights of each variant.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

# Each program runs twice: compiling it takes longer.
os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0"
)
HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "unit" / "torch_native" / "chips"))

import torch  # noqa: E402
from step_variants import VARIANTS, two_steps  # noqa: E402

from torchprime.torch_native.chips.backend import ChipsBackend  # noqa: E402
from torchprime.torch_native.chips.client import Chips  # noqa: E402
from torchprime.torch_native.chips.cpu_client import CpuClient  # noqa: E402
from torchprime.training.processes import OneProcess  # noqa: E402


def main(out: str, *names: str) -> None:
    found = {}
    for name in names or VARIANTS:
        grid = VARIANTS[name].grid
        chips = Chips(CpuClient(grid.count), OneProcess(), grid)
        core, loss = ("reference", ""), ("chunked", "")
        backend = ChipsBackend(chips, remat=True, attention=core, loss=loss)
        found[name] = two_steps(backend, VARIANTS[name])
        print(name, flush=True)
    torch.save(found, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
