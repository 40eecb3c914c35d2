"""The TPU run of GSM8K on GPUs: the same named config, batches and run folder, under torchrun.

    torchrun --standalone --nproc_per_node=4 \\
        experimental/torchrun_gpu_sft/run_sft_gsm8k.py [key=value ...]

Only the mesh follows the machine: unless the command says otherwise, fsdp is the number of
processes. `torchprime compare` then judges this run against the TPU's.
"""

from __future__ import annotations

import os
import sys

from torchprime.config.entry import run_main
from torchprime.torch_native.train import main

CONFIG = "llama-3-8b-sft-w-gsm8k"


def with_defaults(argv: list[str], processes: int) -> list[str]:
    """Return the command line, with the default config and a mesh that fits if it names none."""
    argv = list(argv)
    if not any(
        each in ("--config-name", "-cn") or each.startswith("--config-name=") for each in argv
    ):
        argv = ["--config-name", CONFIG, *argv]
    if not any(each.startswith(("ici_mesh.", "dcn_mesh.", "mesh=")) for each in argv):
        argv += [f"ici_mesh.fsdp={processes}", "ici_mesh.data=1", "ici_mesh.tensor=1"]
    return argv


if __name__ == "__main__":
    world = int(os.environ.get("WORLD_SIZE", "1"))
    sys.exit(run_main(main, with_defaults(sys.argv[1:], world)))
