"""Operations of a convolution against a convolution of ones, whose sum is the number of pairs."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from torchprime.compiling.hlo.program import Program

# left, right, result as XLA writes them; the same for jax, spatial dims 0 and 1 as H and W.
LABELS = {
    "b01f_01io->b01f": ("NHWC", "HWIO", "NHWC"),
    # A product in a windowed einsum of libtpu: the dims are not in their order.
    "b1f0_0o1i->b0f1": ("NWCH", "HOWI", "NHCW"),
}


@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize(
    ("lengths", "sizes", "strides", "padding", "dilation"),
    [
        ((1, 2), (8, 2), (1, 1), ((7, 7), (0, 0)), (1, 1)),
        ((4, 3), (2, 3), (2, 1), ((1, 0), (2, 1)), (1, 2)),
    ],
)
def test_operations_are_twice_the_pairs(labels, lengths, sizes, strides, padding, dilation) -> None:
    left, right, result = LABELS[labels]
    lengths, sizes = dict(zip("HW", lengths, strict=True)), dict(zip("HW", sizes, strict=True))
    x = jnp.ones([({"N": 6, "C": 5} | lengths)[name] for name in left])
    w = jnp.ones([({"I": 5, "O": 7} | sizes)[name] for name in right])
    out = jax.lax.conv_general_dilated(
        x, w, strides, padding, lhs_dilation=dilation, dimension_numbers=LABELS[labels]
    )

    def shape(array: jax.Array) -> str:
        return f"f32[{','.join(map(str, array.shape))}]"

    window = "size={}x{} stride={}x{} pad={}_{}x{}_{} lhs_dilate={}x{}".format(
        *sizes.values(), *strides, *padding[0], *padding[1], *dilation
    )
    program = f"""HloModule one

ENTRY %main (x: {shape(x)}, w: {shape(w)}) -> {shape(out)} {{
  %x = {shape(x)} parameter(0)
  %w = {shape(w)} parameter(1)
  ROOT %out = {shape(out)} convolution(%x, %w), window={{{window}}}, dim_labels={labels}
}}
"""
    assert Program(program).product_flops() == 2 * float(out.sum())
