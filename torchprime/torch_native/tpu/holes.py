"""Collectives put into a StableHLO module that was lowered without them.

TorchTPU lowers its collectives on a host with chips only. Without chips their results
enter the lowered function as further arguments, and their operands leave it as further results: a
hole. Here each hole gets its operation, arguments and results disappear, and the operations are
sorted, since a result of the function may now be needed before its end.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import jax.interpreters.mlir as jax_mlir
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import stablehlo

from torchprime.torch_native.tpu import collectives
from torchprime.torch_native.tpu.grid import Grid

# Operands and types of results -> results, made at the current insertion point.
Make = Callable[[Sequence[ir.Value], Sequence[ir.Type]], Sequence[ir.Value]]


@dataclass(frozen=True)
class Hole:
    """An operation that the lowered module lacks.

    Attributes:
        operands: the number of the function's results that it takes.
        results: the number of the function's arguments that it gives.
    """

    make: Make
    operands: int
    results: int


def filled(text: str, holes: Sequence[Hole], aliases: Sequence[tuple[int, int]] = ()) -> str:
    """Return a module with its holes filled.

    Args:
        text: a module whose main function has the holes' results as last arguments and their
            operands as last results.
        aliases: (argument, result) that share memory.
    """
    with jax_mlir.make_ir_context(), ir.Location.unknown():
        module = ir.Module.parse(text)
        main = next(f for f in module.body.operations if _name(f) == "main")
        _fill(main, holes)
        _alias(main, aliases)
        # TorchTPU names it by a line of the code that lowers it.
        module.operation.attributes["sym_name"] = ir.StringAttr.get("train_step")
        return str(module)


def _name(function: Any) -> str:
    return ir.StringAttr(function.attributes["sym_name"]).value


def _fill(main: Any, holes: Sequence[Hole]) -> None:
    block = main.regions[0].blocks[0]
    end = list(block.operations)[-1]
    returned = list(end.operands)
    kept_results = len(returned) - sum(hole.operands for hole in holes)
    kept_arguments = len(block.arguments) - sum(hole.results for hole in holes)
    operand, argument = kept_results, kept_arguments
    for hole in holes:
        given = list(end.operands)[operand : operand + hole.operands]
        arguments = list(block.arguments)[argument : argument + hole.results]
        with ir.InsertionPoint(end):
            made = hole.make(given, [each.type for each in arguments])
        for old, new in zip(arguments, made, strict=True):
            old.replace_all_uses_with(new)
        operand, argument = operand + hole.operands, argument + hole.results
    results = list(end.operands)[:kept_results]
    with ir.InsertionPoint(end):
        ir.Operation.create("func.return", operands=results)
    end.erase()
    for number in reversed(range(kept_arguments, len(block.arguments))):
        block.erase_argument(number)
    kind = ir.FunctionType.get([a.type for a in block.arguments], [r.type for r in results])
    main.attributes["function_type"] = ir.TypeAttr.get(kind)
    _sort(block)


def _sort(block: Any) -> None:
    """Move each operation behind those whose results it takes; otherwise the order stays."""
    operations = list(block.operations)
    numbers = {each: number for number, each in enumerate(operations)}
    needs = [_needed(each, numbers) for each in operations]
    end, placed = operations[-1], [False] * len(operations)
    for number in range(len(operations)):
        waiting = [number]
        while waiting:
            ready = [n for n in needs[waiting[-1]] if not placed[n]]
            if ready:
                waiting += ready
                continue
            done = waiting.pop()
            if not placed[done]:
                placed[done] = True
                if done != len(operations) - 1:
                    operations[done].move_before(end)


def _needed(operation: Any, numbers: dict[Any, int]) -> list[int]:
    """Return the numbers of the operations of a block that an operation takes results of, in its
    regions too."""
    found: list[int] = []
    walking: Any = ir.WalkResult  # pyright: ignore[reportAttributeAccessIssue]

    def visit(each: Any) -> Any:
        for operand in each.operands:
            owner = operand.owner
            if isinstance(owner, ir.Block):
                continue
            number = numbers.get(owner.opview if hasattr(owner, "opview") else owner)
            if number is not None:
                found.append(number)
        return walking.ADVANCE

    operation.operation.walk(visit)
    return found


def _alias(main: Any, aliases: Sequence[tuple[int, int]]) -> None:
    arguments = list(main.regions[0].blocks[0].arguments)
    if not aliases:
        return
    result = dict(aliases)
    kind = ir.IntegerType.get_signless(32)
    attributes = [
        ir.DictAttr.get(
            {"tf.aliasing_output": ir.IntegerAttr.get(kind, result[n])} if n in result else {}
        )
        for n in range(len(arguments))
    ]
    main.attributes["arg_attrs"] = ir.ArrayAttr.get(attributes)


def with_functions(text: str, functions: Mapping[str, str]) -> bytes:
    """Return a module whose calls of some custom targets are calls of functions, as bytecode: text
    would lose the names of the kernels.

    Args:
        functions: by target, a module whose main function has the same arguments and results.
    """
    with jax_mlir.make_ir_context(), ir.Location.unknown():
        module = ir.Module.parse(text)
        calls = [
            each for each in _every(module, "stablehlo.custom_call") if _target(each) in functions
        ]
        for target in dict.fromkeys(_target(each) for each in calls):
            _add_functions(module, target, functions[target])
        for call in calls:
            callee: Any = ir.FlatSymbolRefAttr.get(_symbol(_target(call), "main"))
            results = [call.results[n] for n in range(len(call.results))]
            with ir.InsertionPoint(call):
                kinds, given = [each.type for each in results], list(call.operands)
                made = ir.Operation.create("func.call", kinds, given, {"callee": callee})
            for number, old in enumerate(results):
                old.replace_all_uses_with(made.results[number])
            call.erase()
        return jax_mlir.module_to_bytecode(module)


def _target(call: Any) -> str:
    return ir.StringAttr(call.attributes["call_target_name"]).value


def _symbol(target: str, name: str) -> str:
    return f"{target}.{name}"


def _every(module: Any, name: str) -> list[Any]:
    found: list[Any] = []
    walking: Any = ir.WalkResult  # pyright: ignore[reportAttributeAccessIssue]

    def visit(each: Any) -> Any:
        if each.name == name:
            found.append(each)
        return walking.ADVANCE

    module.operation.walk(visit)
    return found


def _add_functions(module: Any, target: str, text: str) -> None:
    """Add a module's functions, all private and named after the target."""
    added = ir.Module.parse(text)
    for call in _every(added, "func.call"):
        name = ir.FlatSymbolRefAttr(call.attributes["callee"]).value
        call.attributes["callee"] = ir.FlatSymbolRefAttr.get(_symbol(target, name))
    for function in added.body.operations:
        copy = function.operation.clone(ir.InsertionPoint(module.body))
        copy.attributes["sym_name"] = ir.StringAttr.get(_symbol(target, _name(function)))
        copy.attributes["sym_visibility"] = ir.StringAttr.get("private")


class Makers:
    """Makes the operations that TorchTPU leaves out; each collective gets a channel of its own."""

    def __init__(self, grid: Grid) -> None:
        self.grid, self.channels = grid, count(1)

    def make(self, target: Any, args: Sequence[Any]) -> Make:
        """Return the maker of an operation of the step's graph."""
        dim = int(args[1]) if target is not collectives.ALL_REDUCE else 0
        axes = args[-1]

        def collective(
            operands: Sequence[ir.Value], types: Sequence[ir.Type]
        ) -> Sequence[ir.Value]:
            common = self._common(axes)
            if target is collectives.ALL_GATHER:
                return stablehlo.AllGatherOp(types, operands, dim, **common).results
            if target is collectives.REDUCE_SCATTER:
                made = stablehlo.ReduceScatterOp(types[0], operands[0], dim, **common)
            else:
                made = stablehlo.AllReduceOp(types, operands, **common)
            _add(made.regions[0], types[0])
            return made.results

        return collective

    def kernel(self, name: str) -> Make:
        """Return the maker of a call of a kernel, which `with_functions` replaces."""

        def call(operands: Sequence[ir.Value], types: Sequence[ir.Type]) -> Sequence[ir.Value]:
            return stablehlo.CustomCallOp(types, operands, name).results

        return call

    def _common(self, axes: str) -> dict[str, Any]:
        groups = self.grid.groups(collectives.named(axes))
        kind = ir.RankedTensorType.get(
            [len(groups), len(groups[0])], ir.IntegerType.get_signless(64)
        )
        elements: Any = ir.DenseElementsAttr
        channel: Any = stablehlo.ChannelHandle  # pyright: ignore[reportAttributeAccessIssue]
        integer = ir.IntegerType.get_signless(64)
        values = [ir.IntegerAttr.get(integer, rank) for group in groups for rank in group]
        return {
            "replica_groups": elements.get(values, kind),
            "channel_handle": channel.get(next(self.channels), 1),
            "use_global_device_ids": True,
        }


def _add(region: Any, kind: ir.Type) -> None:
    scalar = ir.RankedTensorType.get([], ir.RankedTensorType(kind).element_type)
    block = region.blocks.append(scalar, scalar)
    with ir.InsertionPoint(block):
        total = stablehlo.AddOp(*block.arguments)
        stablehlo.ReturnOp([total.result])
