"""Programs by key, compiled at their first use, and the values on the chips that they read."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

from torchprime.torch_native.chips.client import Client, Run, Value
from torchprime.torch_native.tpu.step import StepGraph


class Programs:
    """The programs of a backend.

    Attributes:
        values: weights, constants and state, by the names of programs' inputs.
    """

    def __init__(self, client: Client) -> None:
        self.client = client
        self.values: dict[str, Value] = {}
        self._made: dict[Hashable, tuple[StepGraph, Run]] = {}

    def __len__(self) -> int:
        return len(self._made)

    def run(
        self, key: Hashable, build: Callable[[], StepGraph], own: Sequence[Value]
    ) -> list[Value]:
        """Start a program without waiting for the chips, and return its results.

        The values that it writes replace the old ones.

        Args:
            key: of the program, with the shapes of its own inputs.
            build: traces it, at the first use.
            own: its last inputs, which are not among the values.
        """
        if key not in self._made:
            step = build()
            self._made[key] = step, self.client.compile(step)
        step, run = self._made[key]
        named = step.inputs[: len(step.inputs) - len(own)]
        results = run([*(self.values[each.name] for each in named), *own])
        written = [each.name for each in named if each.donated]
        self.values.update(zip(written, results[1:], strict=False))
        return results
