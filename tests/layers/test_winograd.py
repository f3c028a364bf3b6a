"""Tiles against the sum over taps: every length, every axis, and the digits they cost."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nonlocal_jax.layers.winograd import tiled

POSITIONS = (3, 5, 4)


def arrays(axis, length, channels=5, features=6):
    positions = tuple(length if i == axis else n for i, n in enumerate(POSITIONS))
    taps = tuple(3 if i == axis else 1 for i in range(3))
    x = jax.random.normal(jax.random.key(0), (2, *positions, channels))
    return x, jax.random.normal(jax.random.key(1), (*taps, channels, features))


def product(x, kernel):
    return x @ kernel.reshape(kernel.shape[-2:])


def over_taps(x, kernel, axis):
    """Σ_tap x[p + tap − 1] kernel[tap], in float64."""
    x, kernel = (np.asarray(a, np.float64) for a in (x, kernel))
    length = x.shape[axis + 1]
    padded = np.pad(x, [(1, 1) if i == axis + 1 else (0, 0) for i in range(x.ndim)])
    return sum(
        padded.take(range(tap, tap + length), axis + 1)
        @ kernel.take(tap, axis).reshape(kernel.shape[-2:])
        for tap in range(3)
    )


@pytest.mark.parametrize("tile", [2, 4])
@pytest.mark.parametrize(("axis", "lengths"), [(0, (1, 2, 3, 4, 5, 8)), (1, (4, 7)), (2, (1, 6))])
def test_equals_the_sum_over_taps(tile, axis, lengths):
    for length in lengths:
        x, kernel = arrays(axis, length)
        y = jax.jit(tiled, static_argnums=(2, 3, 4))(x, kernel, axis, tile, product)
        chex.assert_trees_all_close(y, over_taps(x, kernel, axis), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("tile", "times"), [(2, 1.5), (4, 2.5)])
def test_few_digits_are_lost(tile, times):
    """Beside a product with all taps, both in float32, on values that are mostly positive, as after a ReLU."""
    x, kernel = arrays(0, 16, channels=256)
    x = jax.nn.relu(x)
    exact = over_taps(x, kernel, 0)
    padded = jnp.pad(x, ((0, 0), (1, 1), (0, 0), (0, 0), (0, 0)))
    taps = jnp.concatenate([padded[:, tap : tap + 16] for tap in range(3)], axis=-1)
    of_product = np.linalg.norm(taps @ kernel.reshape(-1, kernel.shape[-1]) - exact)
    assert np.linalg.norm(tiled(x, kernel, 0, tile, product) - exact) < times * of_product


def test_fewer_products():
    x, kernel = arrays(0, 8)
    sizes = []
    tiled(x, kernel, 0, 4, lambda a, b: sizes.append(a.size) or product(a, b))
    assert sum(sizes) == 6 / 4 * x.size  # three taps: 3
