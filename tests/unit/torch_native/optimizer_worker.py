"""One process of a group: updates by every optimizer from gradients that are given, and a resume.

With the same gradients an update must not depend on the number of processes by a bit.

torchrun --nproc_per_node=N optimizer_worker.py OUT
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

os.environ["USE_TORCH_XLA"] = "0"
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "torch_xla_models"))

import reference  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from halfway import HALF, chunks_of, resumed, together  # noqa: E402
from small_optimizers import EMA_DECAY, GROUPS, NAMES, gradient, small_optimizer  # noqa: E402
from torch import Tensor  # noqa: E402

from torchprime.config.compose import compose_config  # noqa: E402
from torchprime.models.architecture import architecture_from_hf  # noqa: E402
from torchprime.models.decoder import CausalLM  # noqa: E402
from torchprime.sharding import ShardingTable  # noqa: E402
from torchprime.torch_native import placement  # noqa: E402
from torchprime.torch_native.backend import NativeBackend  # noqa: E402
from torchprime.torch_native.runtime import stop_processes  # noqa: E402
from torchprime.training.backend import ResumedState, StepOptions  # noqa: E402
from torchprime.training.optim.ema import WithEma  # noqa: E402
from torchprime.training.optim.groups import freeze_groups, grouped  # noqa: E402
from torchprime.training.step import StepSums, Update, finish_step  # noqa: E402


@dataclass
class Trained:
    """A backend whose weights follow gradients that are given."""

    backend: NativeBackend

    def update(self, step: int) -> None:
        b = self.backend
        named = dict(b.model.named_parameters())
        given = [
            placement.own_part(gradient(n, named[n].shape, step), named[n])
            for n in b.state.parameters
        ]
        sums = StepSums(torch.ones(1), torch.ones(()), given)
        with torch.no_grad():
            update = Update(b.state, b.optimizer, b.options)
            finish_step(update, sums, torch.tensor(reference.LR), over_shards=b._over_shards)

    def held_out(self) -> float:
        """The held-out loss of the average."""
        b = self.backend
        with b.averaged():
            loss, weight = b.read_eval([b.eval_step(b.put(reference.make_batch(99), 1))])
        return loss / weight

    def whole(self) -> dict[str, Tensor]:
        """Every tensor of a checkpoint, put together from all processes."""
        found: list = [None] * dist.get_world_size()
        dist.all_gather_object(found, chunks_of(self.backend))
        return together(found)


def make(name: str, state: ResumedState | None = None) -> Trained:
    size = int(os.environ.get("WORLD_SIZE", "1"))
    backend = NativeBackend({"fsdp": size}, {}, full_precision=True)
    config, theirs = reference.make_model(tied=False)
    start = {name: p.detach() for name, p in theirs.named_parameters()}
    with torch.device("meta"):
        model = CausalLM(architecture_from_hf(config.to_dict()))
    freeze_groups(model, GROUPS)
    shipped = compose_config(["model.pretrained_model=x", "task.max_steps=1"]).sharding
    table = ShardingTable(shipped.parameters, shipped.activations, 100)
    values = start if state is None else {n: state.tensor_of(f"model.{n}") for n in start}
    backend.place(model, table, lambda name: values[name].clone(), torch.float32)
    optimizer = WithEma(grouped(small_optimizer(name), GROUPS), EMA_DECAY)
    backend.prepare_training(optimizer, StepOptions(), state)
    return Trained(backend)


def train(name: str) -> dict[str, Tensor]:
    """Return the whole tensors after all updates. A resume at HALF must give the same."""
    straight = make(name)
    for step in range(HALF):
        straight.update(step)
    again = make(name, resumed(straight.whole()))
    straight.held_out()  # changes nothing
    for step in range(HALF, reference.STEPS):
        straight.update(step)
        again.update(step)
    found, after = straight.whole(), again.whole()
    assert found.keys() == after.keys()
    for key, tensor in found.items():
        assert torch.equal(tensor, after[key]), (name, key)
    return found | {"held_out": torch.tensor(straight.held_out())}


def main(out: Path) -> None:
    torch.set_num_threads(1)
    for name in NAMES:
        found = train(name)
        if dist.get_rank() == 0:
            torch.save(found, out / f"{name}.{dist.get_world_size()}.pt")
    stop_processes()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
