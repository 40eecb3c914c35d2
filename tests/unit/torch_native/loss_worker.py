"""One process of a group: takes steps with each variant of the loss, and compares with the loop.

torchrun --nproc_per_node=N loss_worker.py '{"mesh": {...}, "accumulation": 1}'
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

os.environ["USE_TORCH_XLA"] = "0"
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "torch_xla_models"))

import liger_stand_in  # noqa: E402
import reference  # noqa: E402
import torch  # noqa: E402
import variants  # noqa: E402

from torchprime.config.compose import compose_config  # noqa: E402
from torchprime.models.architecture import architecture_from_hf  # noqa: E402
from torchprime.models.decoder import CausalLM  # noqa: E402
from torchprime.sharding import ShardingTable  # noqa: E402
from torchprime.torch_native.backend import NativeBackend  # noqa: E402
from torchprime.torch_native.runtime import stop_processes  # noqa: E402
from torchprime.training.backend import StepOptions  # noqa: E402


def main(way: dict) -> None:
    torch.set_num_threads(1)
    accumulation = way.get("accumulation", 1)
    backend = NativeBackend(way["mesh"], {}, full_precision=True)
    if way.get("fused"):
        backend.loss, backend.liger_forward = "liger", liger_stand_in.forward
    config, base = reference.make_model(tied=False)
    start = {name: p.detach() for name, p in base.named_parameters()}
    with torch.device("meta"):
        model = CausalLM(architecture_from_hf(config.to_dict()))
    shipped = compose_config(["model.pretrained_model=x", "task.max_steps=1"]).sharding
    table = ShardingTable(shipped.parameters, shipped.activations, 100)
    backend.place(model, table, lambda name: start[name].clone(), torch.float32)
    if way.get("noise"):
        options = StepOptions(
            accumulation, 3, random_seed=variants.SEED, noise_alpha=variants.ALPHA
        )
        backend.prepare_training(variants.Plain(), options)
        variants.check_noise(backend, accumulation)
        stop_processes()
        return
    for kind in variants.KINDS.values():
        if kind.dft and way.get("fused"):
            continue  # the chunked loss takes these
        list(backend.weights())  # the last forward left the root's own weights gathered
        options = StepOptions(accumulation, 3, token_loss=kind, loss_terms=kind.terms)
        backend.prepare_training(variants.Plain(), options)
        for average in variants.AVERAGES:
            variants.check_step(backend, kind, average, accumulation)
        variants.check_held_out(backend)
    stop_processes()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
