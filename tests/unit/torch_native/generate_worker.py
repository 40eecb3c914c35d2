"""One process of a torchrun group: answers prompts between training steps, writes what it saw.

torchrun --nproc_per_node=N generate_worker.py OUT '{"mesh": {...}, "model": "qwen2", ...}'
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

os.environ["USE_TORCH_XLA"] = "0"
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "torch_xla_models"))

import answers  # noqa: E402
import reference  # noqa: E402
import torch  # noqa: E402

from torchprime.config.compose import compose_config  # noqa: E402
from torchprime.config.sections.remat import RematConfig  # noqa: E402
from torchprime.models.architecture import architecture_from_hf  # noqa: E402
from torchprime.models.decoder import CausalLM  # noqa: E402
from torchprime.sharding import ShardingTable  # noqa: E402
from torchprime.torch_native import generation  # noqa: E402
from torchprime.torch_native.backend import NativeBackend  # noqa: E402
from torchprime.torch_native.runtime import stop_processes  # noqa: E402
from torchprime.training.backend import StepOptions  # noqa: E402
from torchprime.training.optim.adamw import AdamW  # noqa: E402

STEPS = 3


def make_backend(way: dict) -> NativeBackend:
    backend = NativeBackend(
        way["mesh"],
        {},
        full_precision=True,
        remat=RematConfig(policy=way.get("remat", "none")),
        compiler=way.get("compiler"),
    )
    config, base = answers.CONFIGS[way["model"]], answers.make_model(way["model"])
    start = {name: p.detach() for name, p in base.named_parameters()}
    with torch.device("meta"):
        model = CausalLM(architecture_from_hf(config.to_dict()))
    shipped = compose_config(["model.pretrained_model=x", "task.max_steps=1"]).sharding
    table = ShardingTable(shipped.parameters, shipped.activations, 100)
    backend.place(model, table, lambda name: start[name], torch.float32)
    backend.prepare_training(AdamW(), StepOptions(1, 3, max_grad_norm=1.0))
    return backend


def step(backend: NativeBackend, number: int) -> float:
    batch = backend.put(reference.make_batch(number), 1)
    return backend.read(backend.train_step(batch, 1e-2)).loss


def held(backend: NativeBackend) -> dict[str, list[torch.Tensor]]:
    """Return a copy of the tensors that a checkpoint would hold."""
    return {t.name: [s.clone() for s in t.read()] for t in backend.checkpoint_tensors()}


def train(way: dict) -> tuple[list[float], dict]:
    """Without a generation."""
    backend = make_backend(way)
    losses = [step(backend, number) for number in range(STEPS)]
    return losses, {name: weight.clone() for name, weight in backend.weights()}


def main(out: Path, way: dict) -> None:
    torch.set_num_threads(1)
    if not way.get("keeps", True):
        generation.Generator._fits = lambda _: False  # type: ignore[method-assign]
    backend = make_backend(way)

    def generated(**changes) -> list:
        return backend.generate(answers.prompts(), answers.options(**changes))

    found = {  # before any forward of training
        "free": generated(),
        "stopped": generated(stop_ids=tuple(way["stops"])),
        "sampled": generated(temperature=0.8, top_k=20, top_p=0.9, seed=7),
    }
    losses, compiled = [], []
    for number in range(STEPS):
        losses.append(step(backend, number))
        before = held(backend)
        generated(max_new_tokens=2)
        for name, shards in held(backend).items():
            assert all(map(torch.equal, shards, before[name])), name
        compiled.append(backend.compiles())
    assert compiled == [int("compiler" in way)] * STEPS, compiled
    whole = {name: weight.clone() for name, weight in backend.weights()}
    everyone = backend.processes.gather(found)
    assert all(each == found for each in everyone)
    # The same training without a generation in it is the same, to the bit.
    plain_losses, plain = train(way)
    assert losses == plain_losses and whole.keys() == plain.keys()
    for name, weight in whole.items():
        assert torch.equal(weight, plain[name]), name
    if backend.processes.index == 0:
        (out / "found.json").write_text(json.dumps(found))
    stop_processes()


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
