"""Operations put into a module that was lowered without them."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from torchprime.compiling.executables import parse
from torchprime.torch_native.tpu.holes import with_functions

CALLER = """
module @step {
  func.func public @main(%x: tensor<4xf32>) -> tensor<4xf32> {
    %a = stablehlo.custom_call @kernel.0(%x) : (tensor<4xf32>) -> tensor<4xf32>
    %b = stablehlo.custom_call @kernel.0(%a) : (tensor<4xf32>) -> tensor<4xf32>
    %c = stablehlo.custom_call @other(%b) : (tensor<4xf32>) -> tensor<4xf32>
    return %c : tensor<4xf32>
  }
}
"""


def test_calls_of_a_target_become_calls_of_its_function() -> None:
    def wrapped(x: jax.Array) -> jax.Array:
        return jnp.clip(x, 0, 1) + 1  # clip is a function of its own in the module

    text = jax.jit(wrapped).lower(jnp.zeros(4)).as_text()
    found = str(parse(with_functions(CALLER, {"kernel.0": text})))
    assert found.count("call @kernel.0.main") == 2 and "custom_call @kernel.0" not in found
    assert "custom_call @other" in found
    assert found.count("func.func private @kernel.0.main") == 1
    assert "call @kernel.0.clip" in found and "func.func private @kernel.0.clip" in found
    assert found.count("func.func public") == 1
