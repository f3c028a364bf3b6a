"""Tiles against the sum over taps: all lengths, all axes, and the digits that they cost."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nonlocal_jax.layers.convolution.cpu.winograd import tiled

POSITIONS = (3, 5, 4)


def arrays(axis, length, channels=5, features=6):
    positions = tuple(length if i == axis else n for i, n in enumerate(POSITIONS))
    taps = tuple(3 if i == axis else 1 for i in range(3))
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, *positions, channels)).astype(np.float32)
    return x, rng.standard_normal((*taps, channels, features)).astype(np.float32)


def product(x, kernel):
    return x @ kernel.reshape(kernel.shape[-2:])


def sum_over_taps(x, kernel, axis):
    """Σ_tap x[p + tap − 1] kernel[tap], in float64."""
    x, kernel = x.astype(np.float64), kernel.astype(np.float64)
    length = x.shape[axis + 1]
    padded = np.pad(x, [(1, 1) if i == axis + 1 else (0, 0) for i in range(x.ndim)])
    return sum(
        padded.take(range(tap, tap + length), axis + 1) @ product_matrix
        for tap, product_matrix in enumerate(kernel.reshape(3, *kernel.shape[-2:]))
    )


@pytest.mark.parametrize("tile", [2, 4])
def test_equals_the_sum_over_taps(tile):
    """On one tile and on several, with the last one full or not."""
    cases = [(0, length) for length in (1, 3, 4, 5, 8)] + [(1, 7), (2, 6)]
    pairs = [arrays(axis, length) for axis, length in cases]

    @jax.jit
    def run(pairs):
        return [
            tiled(*pair, axis, tile, product) for pair, (axis, _) in zip(pairs, cases, strict=True)
        ]

    expected = [sum_over_taps(*pair, axis) for pair, (axis, _) in zip(pairs, cases, strict=True)]
    chex.assert_trees_all_close(run(pairs), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("tile", "factor"), [(2, 1.5), (4, 2.5)])
def test_few_digits_are_lost(tile, factor):
    """Compared with one float32 product of all taps, on rectified values."""
    x, kernel = arrays(0, 16, channels=256)
    x = np.maximum(x, 0)
    exact = sum_over_taps(x, kernel, 0)

    @jax.jit
    def run(x, kernel):
        padded = jnp.pad(x, ((0, 0), (1, 1), (0, 0), (0, 0), (0, 0)))
        taps = jnp.concatenate([padded[:, tap : tap + 16] for tap in range(3)], axis=-1)
        direct = taps @ kernel.reshape(-1, kernel.shape[-1])
        return direct, tiled(x, kernel, 0, tile, product)

    direct_error, tile_error = (np.linalg.norm(y - exact) for y in run(x, kernel))
    assert tile_error < factor * direct_error


def test_fewer_products():
    x, kernel = arrays(0, 8)
    sizes = []

    def counted(x, kernel):
        sizes.append(x.size)
        return product(x, kernel)

    jax.eval_shape(lambda x, kernel: tiled(x, kernel, 0, 4, counted), x, kernel)
    assert sum(sizes) == 6 / 4 * x.size  # three taps take 3
