"""Convolutions on CPU with three taps, computed in tiles that need fewer products."""

import functools
import math

import jax.numpy as jnp

from nonlocal_jax.layers.convolution.cpu.products import row_product
from nonlocal_jax.layers.convolution.cpu.winograd import tiled
from nonlocal_jax.layers.convolution.folding import Triple, conv_2d
from nonlocal_jax.types import Array

JOINED_WIDTH = 2048  # positions: 32 of the blocks of 64 that XLA shares among the cores


def convolution_in_tiles(
    x: Array, kernel: Array, strides: Triple, groups: int, tiles: tuple[int, ...]
) -> Array:
    """Computes a convolution with three taps along each tiled axis, and a stride of 1.

    `tiles` are the outputs of a tile along (T, H, W). An axis with tiles of 1 is not tiled. The
    strides of t×1×1 along H and W may be larger than 1.
    """
    if kernel.shape[1:3] == (1, 1) and strides[1:] != (1, 1):
        x, strides = x[:, :, :: strides[1], :: strides[2]], (strides[0], 1, 1)
    for axis, tile in enumerate(tiles):
        if tile > 1:
            remaining = (*tiles[:axis], 1, *tiles[axis + 1 :])
            convolve = functools.partial(
                convolution_in_tiles, strides=strides, groups=groups, tiles=remaining
            )
            return tiled(x, kernel, axis, tile, convolve)
    if kernel.shape[2] == 1:
        return row_product(x, kernel, strides, groups)
    return convolution_of_joined_rows(x, kernel)


def convolution_of_joined_rows(x: Array, kernel: Array, min_width: int = JOINED_WIDTH) -> Array:
    """Computes a 1×1×w convolution with a stride of 1 on rows joined with zeros between them.

    XLA shares the blocks of one row among the cores, so that short rows would leave most of them
    idle.
    """
    row_count, width, gap = math.prod(x.shape[:3]), x.shape[3], kernel.shape[2] // 2
    divisors = (count for count in range(1, row_count) if row_count % count == 0)
    joined_rows = next(
        (count for count in divisors if count * (width + gap) >= min_width), row_count
    )
    separated = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, gap), (0, 0)))
    joined = separated.reshape(row_count // joined_rows, 1, -1, x.shape[-1])
    y = conv_2d(joined, kernel[0], (1, 1))
    return y.reshape(*separated.shape[:-1], -1)[:, :, :, :width]
