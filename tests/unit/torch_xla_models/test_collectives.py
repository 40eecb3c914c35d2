"""A scanned step under FSDP communicates weights, not activations.

Runs one step in a process of its own with XLA's dump on, and reads the partitioned program. Without
annotations on what a layer keeps, the partitioner cuts kept activations like the weights and
gathers them over the whole batch, which costs more with every token.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import reference

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
from torchprime.torch_xla_models.remat import Remat
from torchprime.training.backend import StepOptions
from torchprime.training.optim.adamw import AdamW

axes = dict(data=1, fsdp=2, expert=1, context=1, tensor=1)
backend = XlaBackend(axes, dict.fromkeys(axes, 1), remat=Remat(scan_layers=True))
with torch.device("meta"):
    model = CausalLM(architecture_from_hf(reference.CONFIG.to_dict()))
shapes = {{n: p.shape for n, p in model.named_parameters()}}
s = compose_config(["model.pretrained_model=x", "task.max_steps=1"]).sharding
backend.place(model, ShardingTable(s.parameters, s.activations),
              lambda n: initial_tensor(n, shapes[n], 0.02, 0), torch.float32)
backend.prepare_training(AdamW(), StepOptions(loss_chunks=1))
backend.read(backend.train_step(backend.put(reference.make_batch(0), 1), 1e-3))
"""


@pytest.mark.slow
def test_scan_under_fsdp_gathers_no_activation(tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "CPU_NUM_DEVICES": "2",
        "XLA_FLAGS": f"--xla_dump_to={tmp_path} --xla_dump_hlo_as_text",
    }
    code = STEP.format(tests=str(Path(__file__).parent))
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    programs = list(tmp_path.glob("*after_optimizations.txt"))
    program = max(programs, key=lambda path: path.stat().st_size).read_text()
    bodies = loop_bodies(program)
    assert len(bodies) == 2  # the layers forward, the layers backward
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
