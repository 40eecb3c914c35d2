"""One process of a group that trains an adapter.

torchrun --nproc_per_node=N adapter_worker.py OUT '{"mesh": {...}, "seed": 1, "lr": 0.01, ...}'
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

from torchprime.adapters.axes import adapter_patterns  # noqa: E402
from torchprime.adapters.spec import AdapterSpec  # noqa: E402
from torchprime.config.compose import compose_config  # noqa: E402
from torchprime.config.schema import AXES  # noqa: E402
from torchprime.config.sections.remat import RematConfig  # noqa: E402
from torchprime.models.architecture import architecture_from_hf  # noqa: E402
from torchprime.sharding import ShardingTable  # noqa: E402
from torchprime.torch_native.backend import NativeBackend  # noqa: E402
from torchprime.torch_native.runtime import stop_processes  # noqa: E402
from torchprime.training.backend import StepOptions  # noqa: E402
from torchprime.training.optim.adamw import AdamW  # noqa: E402
from torchprime.training.setup.adapter import Adapter, build_model  # noqa: E402


def main(out: Path, way: dict) -> None:
    torch.set_num_threads(1)
    start = torch.load(out / "start.pt", weights_only=True)
    config, _ = reference.make_model(False)
    shipped = compose_config(["model.pretrained_model=x", "task.max_steps=1"]).sharding
    plain = ShardingTable(shipped.parameters, shipped.activations)
    mesh = dict.fromkeys(AXES, 1) | way["mesh"]
    adapter = Adapter(AdapterSpec(**way["spec"]), plain, mesh, "adapter")
    model = build_model(architecture_from_hf(config.to_dict()), adapter, torch.float32)
    table = ShardingTable(adapter_patterns(shipped.parameters), shipped.activations, 10**6)
    backend = NativeBackend(
        way["mesh"], {}, remat=RematConfig(policy=way["remat"]), full_precision=True
    )
    backend.check(model, table)
    backend.place(model, table, start.__getitem__, torch.float32)
    options = StepOptions(
        way["accumulation"], 3, max_grad_norm=reference.CLIP, random_seed=way["seed"]
    )
    options = reference.with_term(options, way.get("term"))
    backend.prepare_training(AdamW(eps=way["eps"], weight_decay=reference.DECAY), options)
    found: dict[str, list[float]] = {"losses": [], "norms": []}
    for step in range(way["steps"]):
        batch = backend.put(reference.make_batch(step), way["accumulation"])
        numbers = backend.read(backend.train_step(batch, way["lr"]))
        found["losses"].append(numbers.loss)
        found["norms"].append(numbers.grad_norm)
    weights = {name: weight.clone() for name, weight in backend.weights()}
    if dist.get_rank() == 0:
        torch.save(weights, out / "weights.pt")
        (out / "numbers.json").write_text(json.dumps(found))
    stop_processes()


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
