"""One process of a group: trains as the reference does and writes what it saw.

torchrun --nproc_per_node=N worker.py OUT '{"mesh": {...}, "family": "llama", ...}'
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
import torch.distributed as dist  # noqa: E402
from small_optimizers import GROUPS, small_optimizer  # noqa: E402

from torchprime.config.compose import compose_config  # noqa: E402
from torchprime.config.sections.remat import RematConfig  # noqa: E402
from torchprime.models.architecture import architecture_from_hf  # noqa: E402
from torchprime.models.decoder import CausalLM  # noqa: E402
from torchprime.sharding import ShardingTable  # noqa: E402
from torchprime.torch_native.backend import NativeBackend  # noqa: E402
from torchprime.torch_native.runtime import stop_processes  # noqa: E402
from torchprime.training.backend import StepOptions  # noqa: E402
from torchprime.training.optim.groups import freeze_groups, grouped  # noqa: E402


def main(out: Path, way: dict) -> None:
    torch.set_num_threads(1)
    mesh, accumulation = way["mesh"], way.get("accumulation", 1)
    backend = NativeBackend(
        mesh,
        {},
        attention_kernel=way.get("kernel", "auto"),
        remat=RematConfig(policy=way.get("remat", "none")),
        full_precision=True,
        compiler=way.get("compiler"),
    )
    if way.get("fused"):
        backend.loss, backend.liger_forward = "liger", liger_stand_in.forward
    config, theirs = reference.make_model(
        way.get("tied", False), way.get("family", "llama"), way.get("heads", (4, 2))
    )
    start = {name: p.detach() for name, p in theirs.named_parameters()}
    with torch.device("meta"):
        model = CausalLM(architecture_from_hf(config.to_dict()))
    groups = GROUPS if way.get("groups") else ()
    freeze_groups(model, groups)
    shipped = compose_config(["model.pretrained_model=x", "task.max_steps=1"]).sharding
    table = ShardingTable(shipped.parameters, shipped.activations, 100)
    term = way.get("term")
    base = reference.anchors(start)[0].__getitem__ if (term or "").startswith("kl") else None
    backend.place(model, table, lambda name: start[name].clone(), torch.float32, base)
    options = StepOptions(accumulation, 3, max_grad_norm=reference.CLIP, num_sources=2)
    optimizer = grouped(small_optimizer(way.get("optimizer", "adamw")), groups)
    options = reference.with_term(options, term)
    backend.prepare_training(optimizer, options, anchors=reference.anchor_source(start, term))

    losses, norms, by_source, compiles, terms = [], [], [], [], []
    compiled = backend.compiles()
    for step in range(reference.STEPS):
        batch = reference.make_batch(step)
        numbers = backend.read(backend.train_step(backend.put(batch, accumulation), reference.LR))
        losses.append(numbers.loss)
        norms.append(numbers.grad_norm)
        terms += numbers.terms.values()
        compiles.append(backend.compiles() - compiled)
        weights = batch.source_weights(2)
        by_source.append([s / w for s, w in zip(numbers.source_loss_sums, weights, strict=True)])
    sums = backend.eval_step(backend.put(reference.make_batch(99), 1))
    loss_sum, weight_sum = backend.read_eval([sums])
    logits = backend.logits(list(range(11)))
    held = max(placement_bytes(backend).values())
    found = {name: weight.clone() for name, weight in backend.weights()}
    if dist.get_rank() == 0:
        torch.save(found, out / "weights.pt")
        torch.save(logits, out / "logits.pt")
        numbers = {
            "losses": losses,
            "norms": norms,
            "by_source": by_source,
            "terms": terms,
            "compiles": compiles,
            "held_out": loss_sum / weight_sum,
            "largest_share": held,
        }
        (out / "numbers.json").write_text(json.dumps(numbers))
    stop_processes()


def placement_bytes(backend: NativeBackend) -> dict[str, float]:
    """The part of each matrix that this process holds."""
    whole = dict(backend.model.named_parameters())
    return {
        name: state.weight.numel() / whole[name].numel()
        for name, state in backend.state.parameters.items()
        if "layers" in name and whole[name].dim() == 2
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
