"""A step's graph as the StableHLO program of each chip."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from torchprime.torch_native.tpu.step import StepGraph
from torchprime.torch_native.tpu.torchtpu import lowered, set_precision


@dataclass(frozen=True)
class Program:
    """A lowered step.

    Attributes:
        text: StableHLO without the kernels' content. Its arguments are the step's inputs; the first
            result is the step's numbers, and each further one has the memory of a donated input.
    """

    step: StepGraph
    text: str

    def module_for(self, platform: str) -> bytes:
        """Return the whole module for the platform `tpu` or `cpu`, as bytecode."""
        # late: jax is only where TorchTPU is
        from torchprime.torch_native.tpu.holes import with_functions
        from torchprime.torch_native.tpu.kernels import bodies

        return with_functions(self.text, bodies(self.text, platform))

    @property
    def state_bytes(self) -> int:
        """The bytes of a chip's weights and state, which the program writes in place."""
        donated = (each for each in self.step.inputs if each.donated)
        return sum(each.bytes for each in donated)


def to_text(module: bytes) -> str:
    """Return a module's bytecode as text, with the names of its kernels."""
    # late: as above
    from torchprime.compiling.executables import parse

    return parse(module).operation.get_asm(enable_debug_info=True)


def make_program(step: StepGraph) -> Program:
    """Lower a step.

    Raises:
        RuntimeSetupError: TorchTPU is missing, or in another version.
    """
    set_precision(all(each.dtype != torch.bfloat16 for each in step.held))
    inputs = [(each.shape, each.dtype) for each in step.inputs]
    donated = [number for number, each in enumerate(step.inputs) if each.donated]
    aliases = [(argument, 1 + place) for place, argument in enumerate(donated)]
    return Program(step, lowered(step.graph, inputs, step.grid, aliases))
