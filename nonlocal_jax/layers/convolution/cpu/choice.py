"""Chooses the fastest form of a convolution on a CPU.

All constants were measured on two cores with JAX 0.10.
"""

import functools
import math
from typing import Any

import jax.numpy as jnp

from nonlocal_jax.layers.convolution.cpu.products import (
    row_product,
    shifted_products,
    taps_side_by_side,
)
from nonlocal_jax.layers.convolution.cpu.stem_gradient import frame_by_frame
from nonlocal_jax.layers.convolution.cpu.tiles import convolution_in_tiles
from nonlocal_jax.layers.convolution.folding import (
    ConvFunction,
    Lowering,
    Triple,
    frame_convolution,
    temporal_convolution,
)

# Features, and positions along a row, that XLA's convolution computes at once. Such blocks are
# shared among the cores.
BLOCK = 64
CACHE_BYTES = 4 << 20  # arrays up to this size are still in the cache when they are read again
# A convolution in tiles takes one to two seconds longer to compile, with its gradients. Those of
# I3D R50 on one clip, with 925 million multiply-adds each, make up for it in 50 training steps on 2
# cores of an Intel Xeon and in 30 of an AMD EPYC; those of ResNet-20 on 128 images, with 302
# million, in 150 and 100; those of the toy videos, with 75 and 38 million, in 230 and 1300.
MIN_TILED_MULTIPLY_ADDS = 1 << 29


def choose(
    x_shape: tuple[Any, ...], kernel_shape: tuple[int, ...], strides: Triple, dtype: jnp.dtype
) -> Lowering | None:
    """Returns the fastest known form of a convolution without groups.

    XLA's convolutions on CPU are as fast as its products, with these exceptions:

    - Three taps with a stride of 1 need a half to a quarter of the products in tiles
      (`convolution_in_tiles`).
    - Convolutions of small arrays, and those inside `jax.lax.scan`, run on one thread. One product
      with all taps side by side does not, and is faster as long as everything stays in the cache.
      Beyond that it is slower: 16 to 16 channels of 128·32·32 positions take 52 ms side by side, 6
      ms directly.
    - The gradient of the kernel of t×1×1 takes two to four times as long as one product that is
      then shifted.
    - The gradient of the kernel of the first layer takes three times as long as products frame by
      frame.

    Args:
        x_shape: (B, T, H, W, C). Symbolic sizes, of `jax.export`, cannot be compared, so forms that
            are faster for some sizes only are not chosen for them.
        kernel_shape: (t, h, w, C, features).
        strides: Strides along (T, H, W).
        dtype: Dtype of x.

    Returns:
        The form, or None where the folded form is the fastest.
    """
    taps, channels = math.prod(kernel_shape[:3]), kernel_shape[3]
    if taps == 1:
        return Lowering.of(row_product)
    is_static = all(isinstance(size, int) for size in x_shape)  # not symbolic, in `jax.export`
    if is_static:
        tiles = _choose_tiles(x_shape, kernel_shape, strides, dtype)
        if tiles is not None:
            return tiles
        positions = x_shape[0] * math.prod(_strided(x_shape[1:4], strides))
        side_by_side_bytes = 4 * positions * taps * channels
        if taps <= 27 and channels <= BLOCK and side_by_side_bytes <= CACHE_BYTES:
            return Lowering.of(taps_side_by_side)
    if kernel_shape[1:3] == (1, 1):
        return Lowering.of(temporal_convolution, shifted_products)
    if channels <= 4 and is_static:
        return Lowering.of(frame_convolution, frame_by_frame)
    return None


def _choose_tiles(
    x_shape: tuple[int, ...], kernel_shape: tuple[int, ...], strides: Triple, dtype: jnp.dtype
) -> Lowering | None:
    """Returns a convolution in tiles where that is faster, otherwise None.

    Tiles save products. They cost sums over x and y, and a larger kernel that is computed each
    time. So they are faster where each position has many products (half the harmonic mean of
    channels and features measures that) and where there are many tiles, because each product has
    one row for each tile.
    """
    taps, height_taps, width_taps, channels, features = kernel_shape
    is_temporal = height_taps == 1
    if is_temporal:
        # The strides along H and W of t×1×1 only skip positions.
        x_shape = (*x_shape[:2], *_strided(x_shape[2:4], strides[1:]), x_shape[4])
        strides = (strides[0], 1, 1)
    batch, length, height, width, _ = x_shape
    tiles = _tile_sizes(kernel_shape)
    rows = batch * math.prod(_strided((length, height, width), tiles))
    is_possible = (
        {taps, height_taps, width_taps} <= {1, 3}
        and height_taps == width_taps
        and strides == (1, 1, 1)
        and length % tiles[0] == 0
        and min(height, width) >= height_taps
        # Tiling loses precision, which half precision cannot afford.
        and dtype not in (jnp.bfloat16, jnp.float16)
    )
    positions = batch * length * height * width
    multiply_adds = positions * math.prod(kernel_shape)
    products = channels * features / (channels + features)
    if (
        not is_possible
        or rows < 64
        or products < _min_products(taps, is_temporal, length)
        or multiply_adds < MIN_TILED_MULTIPLY_ADDS
    ):
        return None
    forward = kernel_gradient = _tiled_form(tiles)
    if tiles == (1, 4, 1):
        # Tiles along both axes need fewer products, but their larger temporaries must fit the
        # cache.
        kernel_gradient = _tiled_form((1, 4, 4))
        if 4 * math.prod(x_shape) <= 1.5 * CACHE_BYTES:
            forward = kernel_gradient
    return Lowering.of(forward, kernel_gradient)


def _tile_sizes(kernel_shape: tuple[int, ...]) -> Triple:
    """Returns the outputs of one tile along (T, H, W)."""
    taps, height_taps, _, _, features = kernel_shape
    time_tile = 4 if taps == 3 else 1
    if height_taps == 1:
        return (time_tile, 1, 1)
    return (time_tile, 4, 1) if features <= BLOCK else (time_tile, 2, 2)


def _min_products(taps: int, is_temporal: bool, length: int) -> int:
    """Returns the least c·f / (c + f) of c channels and f features with which tiles were faster."""
    if is_temporal:
        return 100 if length == 4 else 150
    return 30 if taps == 3 else 16


@functools.cache
def _tiled_form(tiles: Triple) -> ConvFunction:
    """Returns the same object for equal tiles, so that equal convolutions hit the jit cache."""
    return functools.partial(convolution_in_tiles, tiles=tiles)


def _strided(sizes: tuple[int, ...], strides: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(-(-size // stride) for size, stride in zip(sizes, strides, strict=True))
