"""All use of TorchTPU's internal interfaces: lowering without a chip, loops, donated memory.

The step's graph is run on TorchTPU's placeholders, which record StableHLO. This needs no chip and
no client of a runtime. The version is checked first: these interfaces may change with any release.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter

from torchprime.torch_native.tpu import collectives
from torchprime.torch_native.tpu.environment import check_environment
from torchprime.torch_native.tpu.grid import Grid
from torchprime.torch_native.tpu.kernels import KERNEL, KERNELS
from torchprime.torch_native.tpu.loops import LOOP, LOOPS

DEVICE = "tpu"


class _TorchTpu:
    """TorchTPU's modules, once the device's name is registered."""

    def __init__(self) -> None:
        check_environment()
        # late: only on hosts with TorchTPU
        from torch_tpu import _loader  # pyright: ignore[reportMissingImports]

        _loader._init_device(DEVICE)  # torch does it itself only on a host with chips
        # late: as above
        from torch_tpu._internal import execution_mode  # pyright: ignore[reportMissingImports]
        from torch_tpu._internal.compile import (  # pyright: ignore[reportMissingImports]
            tpu_torch_compile,
        )

        self.native: Any = tpu_torch_compile
        self.modes: Any = execution_mode

    def tracing(self) -> Any:
        """Return the context in which operations are recorded and not run."""
        return self.modes.set_eager_mode(self.modes.EagerMode._INTERNAL_COMPILE_FX_GRAPH)

    def placeholder(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return a tensor of the device without storage."""
        return self.native.placeholder(list(shape), dtype, False)


_loaded: list[_TorchTpu] = []


def torch_tpu() -> _TorchTpu:
    """Return TorchTPU's modules; they are loaded once.

    Raises:
        RuntimeSetupError: they are not installed, or in another version.
    """
    if not _loaded:
        _loaded.append(_TorchTpu())
    return _loaded[0]


def set_precision(full: bool) -> None:
    """Set the precision of products of fp32 numbers. It is TorchTPU's once that is loaded."""
    torch_tpu()
    torch.set_float32_matmul_precision("highest" if full else "medium")


def lowered(
    graph: GraphModule,
    inputs: Sequence[tuple[Sequence[int], torch.dtype]],
    grid: Grid,
    aliases: Sequence[tuple[int, int]] = (),
) -> str:
    """Return the StableHLO of a step's graph for each chip of a grid.

    Args:
        inputs: shape and type of each.
        aliases: (input, result) that share memory.

    Raises:
        RuntimeSetupError: TorchTPU is missing, or in another version.
    """
    # late: jax is only where TorchTPU is
    from torchprime.torch_native.tpu.holes import Makers

    runtime = torch_tpu()
    with runtime.tracing(), torch.no_grad():
        given = [runtime.placeholder(shape, dtype) for shape, dtype in inputs]
        return _Lowering(graph, runtime, Makers(grid)).text(given, aliases)


def executable(text: str) -> Callable[[Sequence[Tensor]], list[Tensor]]:
    """Compile a module by TorchTPU's runtime for the chips of all processes.

    Returns:
        A function of tensors on this process's chip. The memory of aliased inputs is taken over.
    """
    native = torch_tpu().native
    loaded = native.compile_mlir(native.parse_mlir_text(text))
    return lambda inputs: list(native.execute(loaded, tuple(inputs)))


class _Lowering(Interpreter):
    """Runs a graph on placeholders."""

    def __init__(self, graph: GraphModule, runtime: _TorchTpu, makers: Any) -> None:
        super().__init__(graph)
        self.runtime, self.makers = runtime, makers
        self.holes: list[Any] = []
        self.operands: list[Tensor] = []
        self.results: list[Tensor] = []

    def text(self, given: Sequence[Tensor], aliases: Sequence[tuple[int, int]] = ()) -> str:
        """Return the graph's module."""
        # late: as above
        from torchprime.torch_native.tpu.holes import filled

        native = self.runtime.native
        found = list(self.run(*given))
        module = native.build_mlir([*found, *self.operands], [*given, *self.results])
        return filled(native.serialize_mlir_text(module), self.holes, aliases)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is LOOP:
            return self._loop(*args)
        if target is collectives.BARRIER:
            return torch.ops.tpu._optimization_barrier([x.contiguous() for x in args[0]])
        if target in (collectives.ALL_GATHER, collectives.REDUCE_SCATTER, collectives.ALL_REDUCE):
            return self._collective(target, args)
        if target is KERNEL:
            name, given = args
            return self._hole(self.makers.kernel(name), given, KERNELS[name].results)
        if "device" in kwargs:
            kwargs = {**kwargs, "device": torch.device(DEVICE)}
        return super().call_function(target, args, kwargs)

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        value = super().get_attr(target, args, kwargs)
        constant = isinstance(value, Tensor) and value.device.type == "cpu"
        return self.runtime.native.make_constant_tensor(value) if constant else value

    def _collective(self, target: Any, args: Any) -> Tensor:
        x = args[0]
        shape = list(x.shape)
        if target is collectives.ALL_GATHER:
            shape[args[1]] *= args[2]
        elif target is collectives.REDUCE_SCATTER:
            shape[args[1]] //= args[2]
        return self._hole(self.makers.make(target, args), [x], [(shape, x.dtype)])[0]

    def _hole(self, make: Any, operands: Sequence[Tensor], results: Any) -> list[Tensor]:
        """Leave out an operation, which `holes.filled` makes."""
        # late: as above
        from torchprime.torch_native.tpu.holes import Hole

        made = [self.runtime.placeholder(shape, dtype) for shape, dtype in results]
        self.holes.append(Hole(make, len(operands), len(made)))
        self.operands += [x.clone() for x in operands]  # later operations may write to them
        self.results += made
        return made

    def _loop(self, number: int, init: Any, sequences: Any, constants: Any) -> list[Tensor]:
        loop, native = LOOPS[number], self.runtime.native
        shapes = [x.shape for x in init] + [x.shape[1:] for x in sequences]
        shapes += [x.shape for x in constants]
        every = [*init, *sequences, *constants]
        given = [self.runtime.placeholder(s, x.dtype) for s, x in zip(shapes, every, strict=True)]
        body = _Lowering(loop.graph, self.runtime, self.makers).text(given)
        length = sequences[0].shape[0]
        direction = native.ScanDirection
        return native.create_scan_op(
            inits=list(init),
            inputs=[*sequences, *constants],
            body_module=native.parse_mlir_text(body),
            scan_direction=direction.kReverse if loop.reverse else direction.kForward,
            dummy_ys=[torch.zeros((length, *s), dtype=d, device="meta") for s, d in loop.rows],
            num_scan_inputs=len(sequences),
        )
