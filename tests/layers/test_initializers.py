"""Initializers draw the same numbers as Flax's."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nonlocal_jax.layers import initializers

# Fewer numbers than are drawn at least, as many, and one more.
SHAPES = ((3, 5), (3, 1, 1, 7, 11), (128, 128), (16385, 1))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("distribution", ["normal", "truncated_normal", "uniform"])
def test_variance_scaling(distribution, dtype, shape):
    inputs = tuple(range(len(shape) - 1))
    flax = nn.initializers.variance_scaling(2.0, "fan_in", distribution, in_axis=inputs)
    ours = initializers.variance_scaling(2.0, "fan_in", distribution)
    check_equal(ours, flax, shape, dtype)


def test_fan_out_and_normal():
    flax = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
    check_equal(initializers.variance_scaling(2.0, "fan_out", "normal"), flax, (7, 11), jnp.float32)
    check_equal(initializers.normal(0.01), nn.initializers.normal(0.01), (7, 11), jnp.float32)


def check_equal(ours, flax, shape, dtype):
    key = jax.random.key(3)
    values, expected = (f(key, shape, dtype).astype(jnp.float32) for f in (ours, flax))
    assert float(jnp.std(expected)) > 0
    np.testing.assert_allclose(values, expected, rtol=2 * float(jnp.finfo(dtype).eps))
