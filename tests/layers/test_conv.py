"""A 1×1×1 convolution as one matrix product."""

import chex
import jax
import jax.numpy as jnp
import pytest

from nonlocal_jax.layers import conv


@pytest.mark.parametrize("machine", ["cpu", "gpu"])
@pytest.mark.parametrize("positions", [(), (5,), (2, 0, 3), (2, 3, 4, 5)])
def test_dot_over_positions_is_the_product_over_channels_with_its_gradients(machine, positions, monkeypatch):
    monkeypatch.setattr(conv, "backend", lambda: machine)
    keys = jax.random.split(jax.random.key(0), 4)
    x, dx = (jax.random.normal(key, (*positions, 6)) for key in keys[:2])
    kernel, dkernel = (jax.random.normal(key, (6, 4)) for key in keys[2:])
    dimensions = (((x.ndim - 1,), (0,)), ((), ()))

    def ours(x, kernel):
        return conv.dot_over_positions(x, kernel, dimensions, precision="highest")

    def expected(x, kernel):
        return jnp.einsum("...c,cd->...d", x, kernel, precision="highest")

    y, pull = jax.vjp(ours, x, kernel)
    y_expected, pull_expected = jax.vjp(expected, x, kernel)
    chex.assert_trees_all_close(y, y_expected, rtol=1e-6, atol=1e-6)
    chex.assert_trees_all_close(pull(y), pull_expected(y), rtol=1e-5, atol=1e-5)
    tangents = jax.jvp(ours, (x, kernel), (dx, dkernel))
    chex.assert_trees_all_close(tangents, jax.jvp(expected, (x, kernel), (dx, dkernel)), rtol=1e-6, atol=1e-6)
