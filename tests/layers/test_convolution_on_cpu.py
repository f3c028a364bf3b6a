"""Convolutions for CPUs: each form equals the sum over taps, and is chosen where it pays."""

import functools
import math

import chex
import convolution_oracle as oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nonlocal_jax.layers.convolution import cpu
from nonlocal_jax.layers.convolution.cpu.choice import MIN_TILED_MULTIPLY_ADDS
from nonlocal_jax.layers.convolution.cpu.products import (
    row_product,
    shifted_products,
    taps_side_by_side,
)
from nonlocal_jax.layers.convolution.cpu.stem_gradient import frame_by_frame
from nonlocal_jax.layers.convolution.cpu.tiles import (
    convolution_in_tiles,
    convolution_of_joined_rows,
)
from nonlocal_jax.layers.convolution.folding import frame_convolution, temporal_convolution

POINT, TEMPORAL, SPATIAL, CUBE, STEM = (1, 1, 1), (3, 1, 1), (1, 3, 3), (3, 3, 3), (5, 7, 7)


def tiled_form(*tiles):
    return functools.partial(convolution_in_tiles, tiles=tiles)


@pytest.mark.parametrize(
    ("form", "kernel_size", "channels", "positions", "strides"),
    [
        (row_product, POINT, 5, (5, 7, 11), (2, 1, 2)),
        (taps_side_by_side, TEMPORAL, 5, (5, 7, 11), (1, 1, 1)),
        (taps_side_by_side, CUBE, 5, (5, 7, 11), (2, 1, 2)),
        (shifted_products, TEMPORAL, 5, (5, 7, 11), (1, 1, 1)),
        (shifted_products, (5, 1, 1), 5, (5, 7, 11), (2, 1, 2)),
        (frame_by_frame, (5, 3, 1), 3, (5, 7, 11), (1, 1, 1)),
        (frame_by_frame, (5, 3, 5), 3, (5, 7, 11), (3, 2, 2)),
        (frame_by_frame, (1, 3, 5), 3, (5, 7, 11), (2, 1, 2)),
        (tiled_form(4, 1, 1), TEMPORAL, 5, (8, 5, 7), (1, 1, 2)),
        (tiled_form(1, 4, 1), SPATIAL, 5, (3, 13, 14), (1, 1, 1)),
        (tiled_form(1, 2, 2), SPATIAL, 5, (3, 13, 7), (1, 1, 1)),
        (tiled_form(4, 2, 1), CUBE, 5, (4, 13, 11), (1, 1, 1)),
    ],
)
def test_a_form_equals_the_sum_over_taps_with_its_gradients(
    form, kernel_size, channels, positions, strides
):
    x, kernel = oracle.arrays(kernel_size, channels, 6, positions=positions)

    @jax.jit
    def run(x, kernel):
        y, transpose = jax.vjp(lambda x, kernel: form(x, kernel, strides, 1), x, kernel)
        return y, transpose(jnp.sin(y))

    y = oracle.convolution(x, kernel, strides)
    expected = y, oracle.gradients(x, kernel, np.sin(y), strides)
    chex.assert_trees_all_close(run(x, kernel), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("length", [1, 2, 6, 7])
def test_rows_are_joined_whatever_their_number(length):
    x, kernel = oracle.arrays((1, 1, 3), 5, 6, positions=(length, 5, 9))
    y = jax.jit(convolution_of_joined_rows, static_argnums=2)(x, kernel, 90)
    chex.assert_trees_all_close(y, oracle.convolution(x, kernel), rtol=1e-4, atol=1e-4)


def names(lowering):
    """The names of the two functions, with their tiles."""
    return tuple(
        (function.func.__name__, function.keywords["tiles"])
        if isinstance(function, functools.partial)
        else function.__name__
        for function in lowering
    )


def choice(
    kernel_size, channels, features, positions, strides=(1, 1, 1), dtype=jnp.float32, batch=2
):
    x_shape, kernel_shape = (batch, *positions, channels), (*kernel_size, channels, features)
    return cpu.choose(x_shape, kernel_shape, strides, jnp.dtype(dtype))


@pytest.mark.parametrize(
    ("kernel_size", "channels", "features", "positions", "forward", "kernel_gradient"),
    [
        (POINT, 34, 6, (8, 28, 28), row_product, row_product),
        (SPATIAL, 16, 16, (1, 32, 32), taps_side_by_side, taps_side_by_side),
        (TEMPORAL, 64, 6, (8, 28, 28), temporal_convolution, shifted_products),
        (STEM, 3, 64, (8, 28, 28), frame_convolution, frame_by_frame),
    ],
)
def test_each_form_is_chosen(kernel_size, channels, features, positions, forward, kernel_gradient):
    lowering = choice(kernel_size, channels, features, positions)
    assert lowering == (forward, kernel_gradient, forward)


@pytest.mark.parametrize(
    ("kernel_size", "channels", "features", "positions", "forward", "kernel_gradient"),
    [
        (TEMPORAL, 192, 256, (4, 5, 7), (4, 1, 1), (4, 1, 1)),
        (TEMPORAL, 320, 320, (8, 5, 7), (4, 1, 1), (4, 1, 1)),
        (SPATIAL, 64, 64, (3, 13, 7), (1, 4, 4), (1, 4, 4)),
        (SPATIAL, 64, 64, (8, 56, 56), (1, 4, 1), (1, 4, 4)),
        (SPATIAL, 66, 66, (3, 13, 7), (1, 2, 2), (1, 2, 2)),
        (CUBE, 64, 64, (4, 13, 9), (4, 4, 1), (4, 4, 1)),
        (CUBE, 66, 66, (4, 13, 11), (4, 2, 2), (4, 2, 2)),
    ],
)
def test_tiles_are_chosen(kernel_size, channels, features, positions, forward, kernel_gradient):
    multiply_adds = math.prod((*positions, *kernel_size, channels, features))
    enough = -(-MIN_TILED_MULTIPLY_ADDS // multiply_adds)
    chosen = choice(kernel_size, channels, features, positions, batch=enough)
    tiles = [("convolution_in_tiles", sizes) for sizes in (forward, kernel_gradient, forward)]
    assert list(names(chosen)) == tiles
    # Equal objects, so that the jit cache finds what was traced.
    assert choice(kernel_size, channels, features, positions, batch=enough) == chosen
    smaller = choice(kernel_size, channels, features, positions, batch=enough - 1)
    assert smaller is None or "convolution_in_tiles" not in str(names(smaller))


@pytest.mark.parametrize(
    ("kernel_size", "channels", "positions", "strides", "dtype", "batch"),
    [
        (SPATIAL, 66, (3, 13, 7), (1, 2, 2), jnp.float32, 256),
        (SPATIAL, 66, (3, 13, 7), (1, 1, 1), jnp.bfloat16, 256),
        (SPATIAL, 66, (3, 13, 2), (1, 1, 1), jnp.float32, 256),  # smaller than the kernel
        (SPATIAL, 410, (1, 13, 7), (1, 1, 1), jnp.float32, 2),  # few tiles
        (TEMPORAL, 320, (6, 5, 7), (1, 1, 1), jnp.float32, 64),  # the last tile would not be full
        (TEMPORAL, 320, (4, 5, 7), (2, 1, 1), jnp.float32, 64),
        (STEM, 66, (8, 13, 7), (1, 1, 1), jnp.float32, 64),
    ],
)
def test_no_tiles_where_they_do_not_pay(kernel_size, channels, positions, strides, dtype, batch):
    chosen = choice(kernel_size, channels, channels, positions, strides, dtype, batch)
    assert chosen is None or "convolution_in_tiles" not in str(names(chosen))


def test_the_folded_form_remains_for_strided_planes_of_many_channels():
    assert choice(SPATIAL, 128, 128, (8, 28, 28), (1, 2, 2)) is None
