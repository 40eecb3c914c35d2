"""Layers that keep named outputs for their backward pass and compute the rest again.

The names are those of a `remat` config. A layer's input is always kept. Of the other names torch's
selective activation checkpointing keeps the results of the operations that make them: the products
of a projection, and of attention the product of probabilities and values, or all results of a fused
kernel (its log-sum-exp among them). These operations do not run again. Everything else does.

A policy is asked once for each operation and must know which module called it. In eager mode hooks
on the modules tell it. While torch.compile traces a layer, hooks would be part of the graph; there
each operation has the modules that called it as metadata.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, cast

import torch
import torch.fx.traceback as trace
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from torchprime.models.decoder import output_module

CORE = "core_out"
ATEN, COLLECTIVES = "aten", "_c10d_functional"
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "_scaled_mm", "_int_mm")
# ATen's own fused kernels of attention: cuDNN's, flash, memory-efficient and the CPU's.
FUSED = re.compile("_scaled_dot_product|_flash_attention|_efficient_attention|_cudnn_attention")


class KeepNames:
    """The policy for torch's selective checkpointing that keeps a layer's named outputs.

    Args:
        layers: those that it is for.
        names: of the outputs to keep.
    """

    def __init__(self, layers: Iterable[nn.Module], names: Iterable[str]) -> None:
        self.owners: dict[tuple[str, type], str] = {}
        for layer in layers:
            for name in names:
                path, module = product_of(layer, name)
                self.owners[path, type(module)] = name
        self.inside: str | None = None  # in eager mode, the name whose module runs
        self.after_softmax = False

    def __call__(self, context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        modules = trace.get_current_meta().get("nn_module_stack")
        name = self.inside if modules is None else self._name_of(modules)
        kept = name is not None and self._keeps(name, op)
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    def _name_of(self, modules: dict[str, tuple[str, type]]) -> str | None:
        """Return the name whose module called a traced operation."""
        called = [(path.partition(".")[2], kind) for path, kind in modules.values()]
        found = [self.owners[each] for each in called if each in self.owners]
        # A projection's own operations only; attention's also in the modules of its core.
        return found[-1] if found and (called[-1] in self.owners or found[-1] == CORE) else None

    def _keeps(self, name: str, op: Any) -> bool:
        if isinstance(op, torch._ops.HigherOrderOperator):
            return name == CORE
        kind = op.overloadpacket.__name__
        if op.namespace == COLLECTIVES:
            return kind == "wait_tensor"  # of tensor parallelism: the sum over its processes
        if op.namespace != ATEN:
            return name == CORE
        if name != CORE:
            return kind in PRODUCTS
        if kind in PRODUCTS and self.after_softmax:
            self.after_softmax = False
            return True
        self.after_softmax = self.after_softmax or kind == "_softmax"
        return FUSED.search(kind) is not None

    def watch(self, layer: nn.Module) -> None:
        """Hang the hooks on a layer's modules that say, in eager mode, which of them runs."""

        def enter(name: str | None, *_: Any) -> None:
            if not torch.compiler.is_compiling():
                self.inside, self.after_softmax = name, False

        for path, module in layer.named_modules():
            name = self.owners.get((path, type(module)))
            if name is not None:
                module.register_forward_pre_hook(partial(enter, name))
                module.register_forward_hook(partial(enter, None))


def contexts_of(policy: KeepNames) -> Callable[[], Any]:
    """Return the function that makes torch's two contexts: for the forward pass, and for computing
    it again. It is a plain function, the one kind that torch.compile reads here."""

    def contexts() -> Any:
        policy.inside = None  # a backward pass stops as soon as it has what it needs
        return create_selective_checkpoint_contexts(policy)

    return contexts


def product_of(layer: nn.Module, name: str) -> tuple[str, nn.Module]:
    """Return the path and the module in a layer whose operations make a named output. With an
    adapter it is the frozen linear layer, whose product is the expensive one."""
    path = output_module(name, layer)
    module = layer.get_submodule(path)
    inside = getattr(module, "base_layer", None)
    return (path, module) if inside is None else (f"{path}.base_layer", inside)


class Checkpointed(nn.Module):
    """A layer that keeps its input, and named outputs if `keep` is set, for its backward pass.

    It is mixed into the layer's class, so that torch.compile makes one graph for all layers: it
    would skip a layer whose `forward` is a `functools.partial`, and recompile each one whose
    `forward` is a closure.
    """

    keep: Callable[[], Any] | None = None

    def forward(self, x_BSD: Tensor, *context: Any) -> Tensor:
        run = super().forward
        if not torch.is_grad_enabled():
            return run(x_BSD, *context)
        # Randomness is a function of position: there is no generator whose state matters.
        options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
        if self.keep is not None:
            options["context_fn"] = self.keep
        return cast(Tensor, checkpoint(run, x_BSD, *context, **options))


def checkpoint_layers(layers: Sequence[nn.Module], names: Iterable[str]) -> None:
    """Make layers keep only their input and the named outputs. Parameter names are unchanged."""
    names = list(names)
    policy = KeepNames(layers, names) if names else None
    keep = None if policy is None else contexts_of(policy)
    kinds = {type(layer): _mixed(type(layer)) for layer in layers}
    for layer in layers:
        kept: Any = layer
        kept.__class__ = kinds[type(layer)]
        if policy is not None:
            policy.watch(layer)
            kept.keep = keep


def _mixed(kind: type) -> type:
    return type(f"Checkpointed{kind.__name__}", (Checkpointed, kind), {})
