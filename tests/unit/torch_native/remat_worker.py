"""One process of a group: trains with several remat configs and writes the bits of each.

torchrun --nproc_per_node=N remat_worker.py OUT '{"mesh": {...}, "remat": {name: {...}}, ...}'
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

os.environ["USE_TORCH_XLA"] = "0"
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "torch_xla_models"))

import reference  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from small_optimizers import small_optimizer  # noqa: E402

from torchprime.config.compose import compose_config  # noqa: E402
from torchprime.config.sections.remat import RematConfig  # noqa: E402
from torchprime.models.architecture import architecture_from_hf  # noqa: E402
from torchprime.models.decoder import CausalLM  # noqa: E402
from torchprime.sharding import ShardingTable  # noqa: E402
from torchprime.torch_native.backend import NativeBackend  # noqa: E402
from torchprime.torch_native.runtime import stop_processes  # noqa: E402
from torchprime.training.backend import StepOptions  # noqa: E402


def train(way: dict, remat: RematConfig) -> dict[str, torch.Tensor]:
    """Return the weights after an update, with the loss and the gradient's norm."""
    backend = NativeBackend(
        way["mesh"], {}, remat=remat, full_precision=True, compiler=way.get("compiler")
    )
    config, theirs = reference.make_model(False, "qwen3")
    start = {name: p.detach() for name, p in theirs.named_parameters()}
    with torch.device("meta"):
        model = CausalLM(architecture_from_hf(config.to_dict()))
    shipped = compose_config(["model.pretrained_model=x", "task.max_steps=1"]).sharding
    table = ShardingTable(shipped.parameters, shipped.activations, 100)
    backend.place(model, table, lambda name: start[name].clone(), torch.float32)
    backend.prepare_training(small_optimizer("adamw"), StepOptions(2, 3))
    numbers = backend.read(
        backend.train_step(backend.put(reference.make_batch(0), 2), reference.LR)
    )
    found = {name: weight.clone() for name, weight in backend.weights()}
    return {**found, "numbers": torch.tensor([numbers.loss, numbers.grad_norm])}


def main(out: Path, way: dict) -> None:
    torch.set_num_threads(1)
    found = {name: train(way, RematConfig(**given)) for name, given in way["remat"].items()}
    if dist.get_rank() == 0:
        torch.save(found, out)
    stop_processes()


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
