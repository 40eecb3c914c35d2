"""The steps of torchtpu_case.py as one program each, in TorchTPU's environment.

    torchtpu_worker.py OUT WAYS      lowered by TorchTPU, run by XLA's CPU client on virtual devices
    torchtpu_worker.py OUT WAYS v6e  the same modules through the TPU's compiler, not run

OUT is a folder; each way writes NAME.pt.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from torchtpu_case import LENGTH, LR, STEPS, Case, make_batch, make_case  # noqa: E402

from torchprime.compiling.executables import parse  # noqa: E402
from torchprime.models.decoder import replace_attention_cores  # noqa: E402
from torchprime.torch_native.tpu.grid import Grid  # noqa: E402
from torchprime.torch_native.tpu.kernels import KernelAttention  # noqa: E402
from torchprime.torch_native.tpu.parameters import hold  # noqa: E402
from torchprime.torch_native.tpu.program import Program, make_program  # noqa: E402
from torchprime.torch_native.tpu.step import (  # noqa: E402
    Input,
    Rows,
    StepBuilder,
    Training,
    initial_values,
)
from torchprime.training.step import host_fields  # noqa: E402


def program_of(way: dict) -> tuple[Program, Case]:
    """Lower the step of a way."""
    case, grid = make_case(way), Grid(**way["mesh"])
    if way.get("kernels"):
        replace_attention_cores(case.model, KernelAttention)
    remat = way.get("remat", True)
    parts = hold(case.model, case.table, grid, torch.float32, remat=remat)
    builder = StepBuilder(parts, Training(case.optimizer, case.options))
    fields = host_fields(make_batch(0, way.get("length", LENGTH)), case.options)
    micro = case.options.gradient_accumulation_steps
    rows = fields[0].shape[0] // micro // (grid.data * grid.fsdp)
    kinds = tuple(field.dtype for field in fields)
    return make_program(builder.build(Rows(micro, rows, fields[0].shape[1], kinds))), case


def run(program: Program, module: Any, case: Case, length: int) -> dict:
    """Run a program for some steps on virtual devices; its numbers and whole weights."""
    from torchtpu_cpu import CpuChips

    graph, grid = program.step, program.step.grid
    chips = CpuChips(module, grid.count)
    buffers = dict(case.model.named_buffers())
    states = [
        {
            each.name: value
            for each, value in initial_values(graph, rank, case.start.__getitem__, buffers)
        }
        for rank in range(grid.count)
    ]
    written = [each.name for each in graph.inputs if each.donated]
    numbers = []
    for step in range(STEPS):
        fields = host_fields(make_batch(step, length), case.options)

        def given(each: Input, rank: int, fields: list[Tensor] = fields) -> Tensor:
            if each.name == "lr":
                return torch.tensor(LR)
            if not each.name.startswith("field."):
                return states[rank][each.name].contiguous()
            field, place = fields[int(each.name.removeprefix("field."))], grid.place(rank)
            mine = place["data"] * grid.fsdp + place["fsdp"]
            whole = field.view(each.shape[0], grid.data * grid.fsdp, -1, each.shape[2])
            return whole[:, mine].contiguous()

        results = chips.run([[given(e, rank) for e in graph.inputs] for rank in range(grid.count)])
        for state, found in zip(states, results, strict=True):
            state.update(zip(written, found[1:], strict=True))
            assert torch.equal(found[0], results[0][0]), "chips report different numbers"
        numbers.append(results[0][0][:2].tolist())
    return {"numbers": numbers, "weights": whole_weights(program, states)}


def whole_weights(program: Program, states: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Join the chips' parts; chips that hold the same part must agree bit for bit."""
    weights = {}
    for held in program.step.held:
        whole = torch.full(held.shape, float("nan") if held.dtype.is_floating_point else -1)
        for rank, state in enumerate(states):
            region, part = held.cut.region(held.shape, rank), state[f"model.{held.name}"]
            before = whole[region]
            empty = bool(before.isnan().all() | (before == -1).all())
            assert empty or torch.equal(before, part.to(before.dtype)), held.name
            whole[region] = part
        rows = whole if held.stacked else [whole]
        weights |= dict(zip(held.names, rows, strict=True))
    return weights


def main(out: Path, ways: dict[str, dict], chip: str | None) -> None:
    for name, way in ways.items():
        program, case = program_of(way)
        module = parse(program.module_for("cpu" if chip is None else "tpu"))
        if chip is None:
            found = run(program, module, case, way.get("length", LENGTH))
        else:
            # late: libtpu is loaded only here
            from torchprime.compiling.executables import compiled, tpu_devices

            devices = tpu_devices("v6e:2x4", (2, 4, 1), 1)
            found = compiled(devices, module, out, spmd=False)
            assert "error" not in found, found["error"]
        torch.save({**found, "text": str(module)}, out / f"{name}.pt")
        print(name, "done", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3] if len(sys.argv) > 3 else None)
