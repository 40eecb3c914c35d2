"""The collectives of compiled programs, read from partitioned programs that a process of its own
dumps."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import reference
from dumped import run_and_dump

STEP = """
import sys
sys.path.insert(0, {tests!r})
import torch
import torch_xla.runtime as xr
import reference
from torchprime.config.compose import compose_config
from torchprime.models.architecture import architecture_from_hf
from torchprime.models.decoder import CausalLM, initial_tensor
from torchprime.sharding import ShardingTable
from torchprime.torch_xla_models.backend import XlaBackend
from torchprime.config.sections.remat import RematConfig
from torchprime.training.backend import StepOptions
from torchprime.training.optim.adamw import AdamW

axes = dict(data=1, fsdp=2, expert=1, context=1, tensor=1)
backend = XlaBackend(axes, dict.fromkeys(axes, 1), remat=RematConfig(scan_layers=True))
with torch.device("meta"):
    model = CausalLM(architecture_from_hf(reference.CONFIG.to_dict()))
shapes = {{n: p.shape for n, p in model.named_parameters()}}
s = compose_config(["model.pretrained_model=x", "task.max_steps=1"]).sharding
backend.place(model, ShardingTable(s.parameters, s.activations),
              lambda n: initial_tensor(n, shapes[n], 0.02, 0), torch.float32)
backend.prepare_training(AdamW(), StepOptions(loss_chunks=1))
backend.read(backend.train_step(backend.put(reference.make_batch(0), 1), 1e-3))
"""


LOSS = """
import torch
import torch_xla.runtime as xr
xr.use_spmd()
from torchprime.losses.chunks import Projection
from torchprime.losses.cross_entropy import chunked_cross_entropy
from torchprime.losses.token_loss import TokenLoss
from torchprime.torch_xla_models.mesh import execute, make_mesh, to_device

axes = dict(data=1, fsdp=1, expert=1, context=1, tensor=2)
mesh = make_mesh(axes, dict.fromkeys(axes, 1))
hidden = to_device(torch.randn(4, 16, 16), mesh, ((), (), ())).requires_grad_()
weight = to_device(torch.randn(64, 16), mesh, (("tensor",), ())).requires_grad_()
targets = to_device(torch.randint(0, 64, (4, 16)), mesh, ((), ()))
weights = to_device(torch.rand(4, 16), mesh, ((), ()))
for kind in (TokenLoss(), TokenLoss(label_smoothing=0.1)):
    for chunks in (2, 4):
        output = Projection(weight)
        loss = chunked_cross_entropy(hidden, output, targets, weights, chunks, kind=kind)
        gradients = torch.autograd.grad(loss.loss_sum, (hidden, weight))
        execute([loss.loss_sum, *loss.terms, *gradients])
        print(loss.loss_sum.item(), *(term.item() for term in loss.terms))
"""


def test_label_smoothing_communicates_once_and_not_in_each_chunk(tmp_path: Path) -> None:
    """The vocabulary is sharded. A chunk of the cross-entropy reduces its largest logit, its sum of
    exponentials, its target's logit, and the gradient of its hidden states."""
    counts = [program.count(" all-reduce(") for program in run_and_dump(LOSS, tmp_path, 2)[1]]
    plain, longer, smooth, longer_smooth = (count for count in counts if count)
    assert longer - plain == longer_smooth - smooth == 2 * 4
    assert smooth - plain == 1


@pytest.mark.slow
def test_scan_under_fsdp_gathers_no_activation(tmp_path: Path) -> None:
    """Without annotations on what a layer keeps, the partitioner cuts kept activations like the
    weights and gathers them over the whole batch, which costs more with every token."""
    code = STEP.format(tests=str(Path(__file__).parent))
    program = max(run_and_dump(code, tmp_path, 2)[1], key=len)
    bodies = loop_bodies(program)
    assert len(bodies) == 3  # the layers forward, the loss, the layers backward
    tokens = reference.B * reference.S
    gathers = 0
    for line in "\n".join(bodies).splitlines():
        assert "all-to-all(" not in line, line
        gathered = re.search(r"= \w+\[([\d,]*)\]\S* all-gather\(", line)
        if gathered:
            gathers += 1
            sizes = [int(size) for size in gathered.group(1).split(",") if size]
            assert tokens not in sizes, line
            assert len(sizes) < 3 or sizes[:2] != [reference.B, reference.S], line
    assert gathers >= 2 * 7  # each of a layer's matrices, forward and backward


def loop_bodies(program: str) -> list[str]:
    """The text of each while loop's body."""
    computations = re.split(r"\n(?=(?:ENTRY )?%\S+ \()", program)
    by_name = {text.split()[0].lstrip("%"): text for text in computations if text.startswith("%")}
    return [by_name[name] for name in re.findall(r" while\(.*body=%([\w.\-]+)", program)]
